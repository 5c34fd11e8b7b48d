"""The page of a run, `report.html`: its curves, samples and cost, drawn from the files of its work directory."""
