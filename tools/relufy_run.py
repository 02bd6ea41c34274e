"""A run of `relufy` from teacher to report: text, training with checks on held-out text, export."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyinfer.errors import InputError
from pyinfer.progress import Progress
from pyinfer_tools.relufy_corpus import Corpus, fill_from_text, sample_corpus
from pyinfer_tools.relufy_files import Teacher, read_teacher, write_atomically, write_student
from pyinfer_tools.relufy_model import Llama, kernels, load_weights, save_weights
from pyinfer_tools.relufy_score import Quality, measure
from pyinfer_tools.relufy_train import Plan, Trainer

CHECK_SECONDS = 180  # between checkpoints
QUICK_ROWS = 64  # of held-out text that a check reads, always the same; the report is about all of it
LEVELS = (0.70, 0.75, 0.80, 0.85, 0.90)  # of sparsity, the best state of each is kept
HELDOUT_SEED = 900_000


@dataclass(frozen=True)
class Settings:
    """What the command line was told."""

    text: tuple[Path, ...] = ()
    corpus_tokens: int = 10_000_000
    heldout_tokens: int = 131_072
    fresh: bool = False
    device: str = "auto"


class Run:
    """The files of a run lie in `folder`/training; `folder` itself becomes the checkpoint."""

    def __init__(self, teacher: Teacher, folder: Path, settings: Settings, plan: Plan) -> None:
        self.teacher, self.folder, self.settings, self.plan = teacher, folder, settings, plan
        self.work = folder / "training"
        if settings.fresh:
            self._forget()
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(_device(settings.device))
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # threads take pieces of a batch, not parts of an operation
        model = Llama(teacher.shape, sparse=False)
        load_weights(model, teacher.tensors)
        self.model = model.to(self.device).requires_grad_(False)
        self.curve: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, Any]] = {}
        self.base: dict[bool, float] = {}  # the teacher's perplexity: of all held-out text, of a part

    def _forget(self) -> None:
        """Only what a run wrote: never another file of a folder that was named by mistake."""
        for name in ("train", "heldout"):
            for file in ("tokens.npy", "states.npy", "done.json"):
                (self.work / name / file).unlink(missing_ok=True)
        for path in [self.work / "progress.json", *self.work.glob("*.pt")]:
            path.unlink(missing_ok=True)

    def gather(self) -> None:
        """Make, or go on making, the held-out text and the text to train on."""
        shape, wanted = self.teacher.shape, self.settings
        if wanted.text:
            train_ids, held_ids = self._read_text()
            step = shape.context - 1
            rows, held_rows = len(train_ids) // step, len(held_ids) // step
        else:
            rows, held_rows = wanted.corpus_tokens // shape.context, wanted.heldout_tokens // shape.context
        if rows < self.plan.rows or held_rows < 1:
            raise InputError(
                f"there are {rows} rows of {shape.context} tokens to train on and {held_rows} held out, "
                f"expected at least {self.plan.rows} and 1; give more text or tokens"
            )
        self.held = Corpus(self.work / "heldout", held_rows, shape.context, 0)
        self.corpus = Corpus(self.work / "train", rows, shape.context, shape.width)
        half = Llama(shape, sparse=False).to(self.device)
        half.load_state_dict(self.model.state_dict())
        half = half.to(torch.bfloat16).requires_grad_(False)
        work = [
            (self.held, self.model, HELDOUT_SEED, "held-out text"),
            (self.corpus, half, 1, "training text"),
        ]
        for corpus, model, seed, label in work:
            with Progress(sys.stderr, label, "tokens") as progress:
                if wanted.text:
                    fill_from_text(corpus, model, held_ids if corpus is self.held else train_ids, progress)
                else:
                    sample_corpus(corpus, model, self.plan.seed * 1_000_000 + seed, self._threads(), progress)

    def _read_text(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the given files; the last thirtieth of each is held out."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.teacher.folder)
        train, held = [], []
        for path in self.settings.text:
            text = path.read_text(encoding="utf-8", errors="replace")
            ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
            cut = len(ids) - min(len(ids) // 30, self.settings.heldout_tokens)
            train.append(ids[:cut])
            held.append(ids[cut:])
        return np.concatenate(train)[: self.settings.corpus_tokens], np.concatenate(held)

    def _threads(self) -> int:
        return self.plan.threads if self.device.type == "cpu" else 1

    def open(self) -> None:
        """Make the student, and go on from the last checkpoint where there is one."""
        student = Llama(self.teacher.shape, sparse=True)
        load_weights(student, self.teacher.tensors)
        seen = torch.from_numpy(np.unique(np.array(self.corpus.tokens)).astype(np.int64)).to(self.device)
        self.fused = kernels.fuse(self.device)
        self.trainer = Trainer(
            student.to(self.device), self.model.head_matrix.detach()[seen], self.plan, self.corpus
        )
        state, story = self.work / "state.pt", self.work / "progress.json"
        if state.exists():
            self.trainer.load(state)
        else:
            self.trainer.prepare()
        if story.exists():
            told = json.loads(story.read_text())
            self.curve, self.best = told["curve"], told["best"]
            self.base = {key == "all": value for key, value in told["base"].items()}
        if not self.base:
            self.base = {full: self._measure(self.model, full).perplexity for full in (True, False)}

    def _measure(self, model: Llama, full: bool) -> Quality:
        rows = np.array(self.held.tokens if full else self.held.tokens[:QUICK_ROWS])
        return measure(model, rows, self._threads())

    def train(self, show: Callable[[str], None]) -> None:
        """Train to the end of the plan; a check every few minutes, a checkpoint with it. Resumable."""
        trainer, last = self.trainer, time.perf_counter()
        self.first = replace(trainer.done)
        with Progress(sys.stderr, "training", "tokens") as progress:
            while trainer.part() < 1:
                trainer.step()
                self._tell(progress)
                if trainer.part() >= 1 or time.perf_counter() - last > CHECK_SECONDS:
                    line = self.check()
                    progress.close()
                    show(line)
                    last = time.perf_counter()

    def _tell(self, progress: Progress) -> None:
        done, total = self.trainer.done, self.plan.tokens
        if self.plan.minutes:
            rate = (done.tokens - self.first.tokens) / max(1e-9, done.seconds - self.first.seconds)
            total = min(total, done.tokens + round(rate * max(0.0, 60 * self.plan.minutes - done.seconds)))
        held = f", held-out perplexity {self.curve[-1]['perplexity']:.3f}" if self.curve else ""
        progress.note = f"KL {done.divergence:.4f}, {100 - 100 * done.active:.1f} % zero{held}"
        progress(done.tokens, total)

    def check(self) -> str:
        """Score the student on held-out text, write the checkpoint, keep the best of each level."""
        began = time.perf_counter()
        done = self.trainer.done
        found = self._measure(self.trainer.average, False)
        row: dict[str, Any] = {
            "part": self.trainer.part(), "step": done.step, "tokens": done.tokens, "seconds": done.seconds,
            "divergence": done.divergence, "state_error": done.error, "price": math.exp(done.log_price),
            "perplexity": found.perplexity, "above_teacher": self._above(found, False),
            "zero": found.zero, "zero_per_layer": found.zero_per_layer,
        }  # fmt: skip
        self.curve.append(row)
        done.seconds += time.perf_counter() - began
        self.trainer.save(self.work / "state.pt")
        for level in LEVELS:
            name = f"best-{level * 100:.0f}"
            known = self.best.get(name, {}).get("above_teacher", math.inf)
            if found.zero >= level and row["above_teacher"] < known:
                self.best[name] = row
                self.trainer.save(self.work / f"{name}.pt")
        base = {"all" if key else "part": value for key, value in self.base.items()}
        told = {"base": base, "best": self.best, "curve": self.curve}
        write_atomically(self.work / "progress.json", json.dumps(told, indent=1).encode())
        return (
            f"{row['part']:4.0%}  {done.tokens / 1e6:6.2f} M tokens  KL {done.divergence:.4f}  perplexity "
            f"{found.perplexity:.4f} ({row['above_teacher']:+.2%})  {found.zero:.2%} zero"
        )

    def _above(self, found: Quality, full: bool) -> float:
        return found.perplexity / self.base[full] - 1

    def export(self, state: Path | None = None) -> dict[str, Any]:
        """Write the checkpoint, read it back, score that on all held-out text. Returns the report."""
        if state is not None:
            self.trainer.load(state)
        student = self.trainer.average
        theta = student.theta.detach().float().cpu().numpy()
        threshold = write_student(self.folder, self.teacher, save_weights(student), theta)
        written = read_student(self.folder)
        found = self._measure(written.to(self.device), True)
        report = {
            "teacher_perplexity": self.base[True],
            "perplexity": found.perplexity,
            "above_teacher": self._above(found, True),
            "zero": found.zero,
            "zero_per_layer": found.zero_per_layer,
            "heldout_tokens": found.tokens,
            "threshold": threshold,
            "state": None if state is None else state.name,
            "steps": self.trainer.done.step,
            "tokens": self.trainer.done.tokens,
            "seconds": self.trainer.done.seconds,
            "corpus_tokens": int(self.corpus.tokens.size),
            "text": [path.name for path in self.settings.text] or "sampled from the teacher",
            "plan": asdict(self.plan),
            "curve": self.curve,
        }
        write_atomically(self.folder / "relufy.json", json.dumps(report, indent=1).encode())
        return report


def read_student(folder: Path) -> Llama:
    """The model of a folder that `export` wrote, with its one threshold for all neurons."""
    found = read_teacher(folder, "fatrelu")
    model = Llama(found.shape, sparse=True)
    load_weights(model, found.tensors)
    with torch.no_grad():
        model.theta.fill_(float(found.config["hidden_act_param"]))
    return model.requires_grad_(False)


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no such device here; leave the option away")
    return wanted


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [
        ("teacher's perplexity", f"{report['teacher_perplexity']:.4f}"),
        ("student's perplexity", f"{report['perplexity']:.4f} ({report['above_teacher']:+.2%})"),
        ("gates exactly zero", f"{report['zero']:.2%}"),
        *((f"layer {i}", f"{share:.2%}") for i, share in enumerate(report["zero_per_layer"])),
        ("held-out tokens", str(report["heldout_tokens"])),
        ("fatrelu threshold", f"{report['threshold']:g}"),
        ("trained on", f"{report['tokens']} tokens, {report['steps']} steps"),
        ("training time", f"{report['seconds'] / 60:.1f} min"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"| {name:{width}} | {value} |" for name, value in rows]
    return "\n".join([f"| {'':{width}} | value |", f"|{'-' * (width + 2)}|---|", *lines])
