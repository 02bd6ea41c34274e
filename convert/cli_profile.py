"""`pyinfer-convert profile`: count how often each neuron of a model fires on a text, into its section.

The counts are saved every few seconds with the place in the text, so a run that was killed goes on where it
was. For activations that are hardly ever zero it then measures what it costs to skip small ones. Everything
it says goes to standard error; exit codes are those of `pyinfer_convert.terminal`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from pyinfer.errors import FormatError, InputError, PyInferError
from pyinfer.progress import Progress
from pyinfer_convert.shared_options import model_and_texts, threads_option
from pyinfer_convert.terminal import Signals, exit_code, note

if TYPE_CHECKING:
    from pyinfer.neurons.corpus import Corpus
    from pyinfer.neurons.profile import Profile
    from pyinfer.runtime.session import Session
    from pyinfer.section import Section
    from pyinfer.text.tokenizer import Tokenizer

USUAL_TOKENS = 100_000
SAVE_SECONDS = 10.0
SHARES_ARE_OF = 1_000_000  # tokens, where imported files hold shares instead of counts


@dataclass
class _Target:
    """The model's file, what its section says so far, and what counting needs to know about the model."""

    path: Path
    profile: Profile
    tokenizer: Tokenizer
    replaces: bool = False  # a section that cannot be read: the whole of it goes
    measured: bool = False  # the section says what skipping costs, with this profile

    @property
    def observe(self) -> str:
        return "fired" if self.profile.histogram is None else "histogram"

    def save(self) -> None:
        from pyinfer.section import Section, update_section, write_section

        if self.replaces:
            note("note: the section that could not be read is replaced")
            write_section(self.path, Section({"profile": self.profile.to_entry()}))
            self.replaces = False
        else:
            update_section(self.path, profile=self.profile.to_entry(), thresholds=None)
        self.measured = False


def _open_target(path: Path, fresh: bool) -> _Target:
    """raises FormatError for a section that cannot be read, unless `fresh`"""
    from pyinfer.gguf_file import open_gguf
    from pyinfer.model_store import check_may_change
    from pyinfer.models import build_program
    from pyinfer.neurons.profile import Profile
    from pyinfer.neurons.sparsity import activation_of, fires_rarely
    from pyinfer.section import read_section
    from pyinfer.text.tokenizer import Tokenizer

    check_may_change(path)
    with open_gguf(path) as file:
        hparams, program = build_program(file)
        empty = Profile.empty(
            hparams.block_count,
            hparams.feed_forward_length,
            activation_of(program),
            histogram=not fires_rarely(program),
        )
        window = min(
            empty.window_tokens, hparams.context_length, program.most_positions or hparams.context_length
        )
        tokenizer = Tokenizer.from_metadata(file.metadata)
        target = _Target(path, replace(empty, window_tokens=window), tokenizer)
        try:
            section = read_section(file)
        except FormatError:
            if not fresh:
                raise
            target.replaces = True
            return target
    entry = section.entries.get("profile") if section and not fresh else None
    if entry is not None:
        target.profile = _stored(entry, target)
        target.measured = _is_measured(section)
    return target


def _is_measured(section: Section) -> bool:
    from pyinfer.neurons.cats import expected_loss

    try:
        return expected_loss(section, 0.0) is not None
    except FormatError:
        return False


def _stored(entry: Any, target: _Target) -> Profile:
    from pyinfer.neurons.profile import Profile

    new = target.profile
    try:
        old = Profile.from_entry(entry, *new.counts.shape)
        new.merge(old)
    except PyInferError as error:
        raise FormatError(f"{target.path.name}: {error}; --fresh counts anew") from None
    return old


def _texts(paths: Sequence[Path], target: _Target, most_tokens: int) -> tuple[list[Corpus], list[np.ndarray]]:
    """The texts to count, together at most so many tokens, rounded up to whole windows.

    And windows behind those, and behind what was counted before, to measure on where that is wanted.
    """
    from pyinfer.neurons.corpus import read_corpus
    from pyinfer_convert.held_out import MOST_WINDOWS, choose_windows

    each = target.profile.window_tokens
    windows = -(-most_tokens // each)
    more = MOST_WINDOWS if target.profile.histogram is not None else 0
    before = max((text["windows"] for text in target.profile.corpus), default=0) if more else 0
    found: dict[str, Corpus] = {}
    behind = []
    for path in paths:
        if windows <= 0:
            note(f"note: {path} is not reached, the texts before it have {most_tokens} tokens (--tokens)")
            break
        corpus = read_corpus(path, target.tokenizer, each, max(windows, before) + more)
        if corpus.sha256 in found:
            note(f"note: {path} is the same text as {found[corpus.sha256].name}, which is counted once")
            continue
        behind.append(corpus.windows[max(windows, _counted(target.profile, corpus)) :])
        found[corpus.sha256] = replace(corpus, windows=corpus.windows[:windows])
        windows -= len(found[corpus.sha256].windows)
    return list(found.values()), choose_windows(behind) if more else []


def _counted(profile: Profile, corpus: Corpus) -> int:
    """How many windows of a text a profile has."""
    return next((each["windows"] for each in profile.corpus if each["sha256"] == corpus.sha256), 0)


class _Counter:
    """Adds what a session observed to what was counted before."""

    def __init__(self, session: Session, target: _Target) -> None:
        self._session, self._target, self._before = session, target, target.profile
        self._added: dict[str, dict[str, Any]] = {}
        self._whole = True  # no window was left in its middle

    def add(self, corpus: Corpus, window: np.ndarray) -> None:
        """Run a window of a text through the model."""
        self._whole = False
        self._session.truncate(0)
        self._session.prefill(window)
        self._whole = True
        new = {"name": corpus.name, "sha256": corpus.sha256, "tokens": 0, "windows": 0}
        text = self._added.setdefault(corpus.sha256, new)
        text["tokens"] += len(window)
        text["windows"] += 1

    def save(self) -> None:
        before, what = self._before, self._target.observe
        if not self._added or not self._whole:
            return
        seen = np.stack([self._session.observed(what, layer) for layer in range(len(before.counts))])
        corpus = {each["sha256"]: each for each in before.corpus}
        for sha256, new in self._added.items():
            old = corpus.get(sha256, {"tokens": 0, "windows": 0})
            corpus[sha256] = {**new, **{key: old[key] + new[key] for key in ("tokens", "windows")}}
        self._target.profile = replace(
            before,
            counts=before.counts + seen if what == "fired" else before.counts,
            histogram=before.histogram + seen if before.histogram is not None else None,
            tokens=before.tokens + sum(each["tokens"] for each in self._added.values()),
            corpus=list(corpus.values()),
        )
        self._target.save()


def _count(target: _Target, texts: list[Corpus], threads: int | None, signals: Signals) -> None:
    """Count what is not counted yet, saving now and then. raises KeyboardInterrupt, what is counted saved"""
    from pyinfer.jit.kernel_cache import kernel_cache_is_cold
    from pyinfer.runtime.loader import load_model
    from pyinfer.runtime.session import Session

    todo = [(text, window) for text in texts for window in text.windows[_counted(target.profile, text) :]]
    if not todo:
        return
    total = sum(text.tokens for text in texts)
    done = total - sum(len(window) for _, window in todo)
    if done:
        note(f"{done} of {total} tokens are counted already; going on with the others")
    if kernel_cache_is_cold():
        note("compiling kernels for this processor, once (some seconds)")
    with Progress(sys.stderr, f"reading {target.path.name}") as bar:
        model = load_model(target.path, observe=target.observe, progress=bar)
    with model, signals.held():
        session = Session(model, target.profile.window_tokens, threads)
        counter = _Counter(session, target)
        save_at = time.monotonic() + SAVE_SECONDS
        try:
            with Progress(sys.stderr, "counting", "tokens") as bar:
                for text, window in todo:
                    signals.check()
                    counter.add(text, window)
                    done += len(window)
                    bar(done, total)
                    if (now := time.monotonic()) >= save_at:
                        counter.save()
                        took = time.monotonic() - now
                        save_at = now + took + SAVE_SECONDS * max(1.0, 2 * took)  # less often on a slow disk
            counter.save()
        except KeyboardInterrupt:
            counter.save()
            raise
        finally:
            session.close()


def _imported(folder: Path, target: _Target) -> Profile:
    """PowerInfer's counts as a profile. They do not say of how many tokens: the neuron that fired most is
    taken to have fired for all of them.
    """
    import hashlib

    from pyinfer_convert.powerinfer_activation import read_activations

    old = target.profile
    if old.histogram is not None:
        raise InputError(
            f"{target.path.name}: activation {old.activation} is hardly ever zero, expected a ReLU model for "
            "counts of neurons that fired"
        )
    n_layers, n_neurons = old.counts.shape
    values = np.stack(read_activations(folder, expected=(n_layers, n_neurons)))
    digest = hashlib.sha256(np.ascontiguousarray(values, np.float64)).hexdigest()
    whole = bool((values == np.rint(values)).all())
    if not whole and values.max() > 1:
        raise FormatError(
            f"{folder}: holds {values.max():g} and fractions, expected whole counts or shares up to 1"
        )
    counts = np.rint(values if whole else values * SHARES_ARE_OF)
    tokens = int(counts.max()) if whole else SHARES_ARE_OF
    if not 0 < tokens < 1 << 40:
        raise FormatError(f"{folder}: the highest count is {tokens}, expected 1 to {(1 << 40) - 1}")
    text = {"name": folder.resolve().name, "from": "PowerInfer", "sha256": digest, "tokens": tokens}
    return replace(old, counts=counts.astype(np.int64), tokens=tokens, corpus=[{**text, "windows": 0}])


def describe(profile: Profile, *, each_layer: bool = False) -> list[str]:
    """What a profile says, in a few lines for people."""
    texts = f"{len(profile.corpus)} text{'s' if len(profile.corpus) > 1 else ''}"
    lines = [f"profile: {profile.tokens} tokens of {texts}"]
    layers = range(len(profile.counts))
    if not profile.tokens:
        return lines
    if profile.histogram is not None:
        half = [profile.quantile(layer, 0.5) for layer in layers]
        span = f"{min(half):.2g} to {max(half):.2g}"
        lines[0] += f"; half of all |{profile.activation}| lie below {span}, depending on the layer"
        return lines + [f"  layer {layer}: {half[layer]:.3g}" for layer in layers if each_layer]
    share = profile.share
    ordered = np.sort(profile.counts, axis=None)[::-1].cumsum()
    few = (np.searchsorted(ordered, 0.8 * ordered[-1]) + 1) / len(ordered)
    lines[0] += f"; a neuron fires for {share.mean():.1%} of them"
    lines[0] += f"; 80 % of activations come from {few:.1%} of neurons"
    if each_layer:
        never, often = (profile.counts == 0).sum(1), (share > 0.5).sum(1)
        lines += [
            f"  layer {layer}: {share[layer].mean():.1%}, {often[layer]} neurons for more than half of the "
            f"tokens, {never[layer]} never"
            for layer in layers
        ]
    return lines


def _profile(path: Path, options: dict[str, Any], signals: Signals) -> None:
    target = _open_target(path, options["fresh"])
    if options["folder"] is not None:
        new = _imported(options["folder"], target)
        if new.corpus[0]["sha256"] in {each["sha256"] for each in target.profile.corpus}:
            note(f"{options['folder']}: these counts are in the profile already; nothing was changed")
            return
        target.profile = target.profile.merge(new) if target.profile.tokens else new
        target.save()
    else:
        _count_and_measure(target, options, signals)
    for line in describe(target.profile, each_layer=options["verbose"]):
        note(line)
    note(f"{path}: the profile is in its section")


def _count_and_measure(target: _Target, options: dict[str, Any], signals: Signals) -> None:
    from pyinfer_convert.held_out import measure_loss

    texts, behind = _texts(options["texts"], target, options["tokens"])
    before = target.profile.tokens
    _count(target, texts, options["threads"], signals)
    measures = target.profile.histogram is not None and not options["no_loss"] and not target.measured
    if target.profile.tokens == before:
        kept = "" if measures else "; nothing was changed"
        note(f"all of this is counted already{kept} (more: --tokens; anew: --fresh)")
    if measures:
        measure_loss(target.path, behind, options["threads"], signals)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@model_and_texts("")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=USUAL_TOKENS,
    show_default=True,
    help="Count so many tokens of the texts, or all if there are fewer.",
)
@click.option(
    "--import",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Take PowerInfer's counts instead: activation_0.pt, activation_1.pt ...",
)
@click.option(
    "--no-loss",
    is_flag=True,
    help="For SiLU and GELU: do not measure, on text behind what is counted, what cats=SHARE costs.",
)
@click.option("--fresh", is_flag=True, help="Forget what was counted before.")
@threads_option
@click.option("-v", "--verbose", is_flag=True, help="A line for each layer; tracebacks.")
@click.pass_context
def profile(
    context: click.Context, model: Path, more: tuple[Path, ...], texts: tuple[Path, ...], **options: Any
) -> None:
    """Count how often each neuron of MODEL fires on texts, and write that into MODEL's section.

    A run that was killed goes on where it was; another text adds to the profile. For models with SiLU or GELU
    it counts how large activations are instead, and measures what it costs to skip the smallest ones.
    Example: pyinfer-convert profile story.gguf --text c4.txt
    """
    options["texts"] = (*texts, *more)
    if bool(options["texts"]) == (options["folder"] is not None):
        raise click.UsageError(
            "Give texts to count on (--text FILES...) or counts of PowerInfer (--import DIR)."
        )
    again = " (without --fresh)" if options["fresh"] else ""
    context.exit(
        exit_code(
            partial(_profile, model, options),
            f"what was counted is saved, and the same command{again} goes on from there",
            verbose=options["verbose"],
        )
    )
