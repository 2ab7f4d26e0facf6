"""Tasks of lm-evaluation-harness on data made here, as a user would write them."""

import json
import pathlib

TASKS = {
  "tiny_choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json, train: {folder}/shots.json}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
  "tiny_text": """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.json}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""",
  "tiny_answer": """
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
""",
}

WORDS = ["river", "tree", "bird", "wind", "book", "map", "hill", "town", "sea", "leaf"]


def write(folder: pathlib.Path) -> pathlib.Path:
  """A folder with the three tasks and their data: six questions, four texts."""
  folder.mkdir(parents=True, exist_ok=True)
  questions = [
    dict(
      question=f"The {WORDS[i]} and the",
      choices=[WORDS[(i + n) % 10] for n in (1, 2, 3)],
      answer=i % 3,
    )
    for i in range(6)
  ]
  shots = [dict(question=f"A {word}", choices=["x", "y"], answer=0) for word in WORDS]
  texts = [dict(text=" ".join(WORDS[i:] + WORDS[:i]) + ".") for i in range(4)]
  for name, rows in (("choice", questions), ("shots", shots), ("text", texts)):
    (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
  for name, text in TASKS.items():
    (folder / f"{name}.yaml").write_text(text.format(folder=folder))
  return folder
