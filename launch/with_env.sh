#!/usr/bin/env bash
# launch/with_env.sh FILE COMMAND...
#
# Runs the command with the variables of a file that has lines NAME=VALUE: keys that must not stand on a command line.
# A value is taken as it stands; nothing in the file is run. Blank lines and lines that begin with # are left out.

set -euo pipefail
number=0
while IFS= read -r line || [[ $line ]]; do
  number=$((number + 1))
  [[ $line && $line != \#* ]] || continue
  [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || {
    echo "launch: $1 line $number is not NAME=VALUE" >&2
    exit 2
  }
  export "${line%%=*}=${line#*=}"
done <"$1"
exec "${@:2}"
