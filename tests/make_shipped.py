"""Writes `d1jax/shipped/sudoku`, the model that comes with d1jax, from a finished run of `make train`.

`python -m tests.make_shipped runs/grpo`: an export in float16, half as large, with a model card of its own.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from d1jax import export, source
from d1jax.models.tensor_files import SINGLE, TensorFiles, write
from tests import jobs

USE = """## Use

```
d1jax generate --pretrained=d1jax:sudoku --task=sudoku --bare.task.style=terse --prompt=0300413012003420
```

```python
import d1jax

model = d1jax.from_pretrained("d1jax:sudoku")
print(d1jax.generate(model, ["0300413012003420abcdefghijklmnop"])[0].text)
```

The weights are stored in float16. `generation_config.json` holds how the run samples: 18 tokens in one block, 4 steps.
"""


def main(run: str) -> None:
  with tempfile.TemporaryDirectory() as scratch:
    exporting = jobs.load("export")
    exporting.update(checkpoint=run, output=str(Path(scratch) / "sudoku"))
    made = export.run(exporting)
    tensors = TensorFiles(made)
    halves = {name: tensors.read(name).astype(np.float16) for name in tensors.shapes}
    write(made / SINGLE, halves)
    config = json.loads((made / "config.json").read_text()) | {"torch_dtype": "float16"}
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    card = made / "README.md"
    card.write_text(card.read_text().partition("## Use")[0] + USE)
    shutil.rmtree(source.SHIPPED / "sudoku", ignore_errors=True)
    shutil.copytree(made, source.SHIPPED / "sudoku")


if __name__ == "__main__":
  main(sys.argv[1])
