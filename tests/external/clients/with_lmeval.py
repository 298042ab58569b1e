"""lm-eval: its model gguf over llama-cpp-python's server, in an evaluation of a small task of our own."""

import json
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.gguf import GGUFLM
from lm_eval.tasks import TaskManager
from steered import SERVED, pair, serving, works

from edge_steer import SteeredLlama

QUESTIONS = [("The weather today was", (" wonderful.", " terrible.")), ("My life is", (" a gift.", " a burden."))]
TASK = """
task: mood
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""

models = pair(logits_all=True)
with tempfile.TemporaryDirectory() as name, serving(models.given) as address:
    folder = Path(name)
    docs = [{"text": text, "choices": list(choices)} for text, choices in QUESTIONS]
    (folder / "mood.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (folder / "mood.yaml").write_text(TASK.replace("FILE", str(folder / "mood.jsonl")))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model = GGUFLM(base_url=address.removesuffix("/v1"))

    def through() -> list[float]:
        found = simple_evaluate(model=model, tasks=["mood"], task_manager=manager, bootstrap_iters=0)
        return [round(r[0][0], 3) for each in found["samples"]["mood"] for r in each["resps"]]

    def directly(own: SteeredLlama) -> list[float]:
        return [round(log_probability(own, text, choice), 3) for text, choices in QUESTIONS for choice in choices]

    def log_probability(own: SteeredLlama, text: str, choice: str) -> float:
        """As lm-eval computes it of the server's answer."""
        own.reset()
        answer = own.create_completion(text + choice, max_tokens=1, echo=True, logprobs=10, temperature=0.0)
        found = answer["choices"][0]["logprobs"]
        first = next(i for i, offset in enumerate(found["text_offset"]) if offset >= len(text))
        return sum(found["token_logprobs"][first:-1])

    models.demand_same("log-probabilities", through, directly)
works("lm-eval", SERVED)
