"""Answers of tasks as files, with everything that they depend on."""

import dataclasses
import json
import pathlib

from sparsejax.configuration import record
from sparsejax.evaluation import subject as subjects


def write(task: str, cells, text: str, subject: subjects.Subject, out: pathlib.Path) -> str:
  """Writes `TASK.json` and `TASK.md`; returns the text.

  Args:
    task: name.
    cells: dataclasses, one for each line of the answer.
    text: the answer as markdown.
    subject: who was asked.
    out: directory.
  """
  backends = {choice.op: {} for choice in subject.backends}
  for choice in subject.backends:
    backends[choice.op][choice.backend] = None
  content = dict(
    task=task,
    run=subject.path.parent.parent.name,
    step=subject.step,
    method="+".join(subject.transformer.options.pattern),
    environment=record.environment(),
    backends={op: ", ".join(names) for op, names in backends.items()},
    config_hash=record.digest(subject.config),
    config=record.as_json(subject.config),
    cells=[dataclasses.asdict(cell) for cell in cells],
  )
  out.mkdir(parents=True, exist_ok=True)
  (out / f"{task}.json").write_text(json.dumps(content, indent=2) + "\n")
  (out / f"{task}.md").write_text(text)
  return text
