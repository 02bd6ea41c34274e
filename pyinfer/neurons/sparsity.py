"""Decides how every feed-forward layer of a model is computed, from what is asked and what the file has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError, InputError, UnsupportedError
from pyinfer.gguf_file import GGUFFile
from pyinfer.neurons.budget import model_bytes
from pyinfer.neurons.placement import ON_CPU, Placement, fit, often
from pyinfer.neurons.predictor import RAW, RELU, Predictors, predictor_ranks
from pyinfer.neurons.profile import Profile
from pyinfer.program.program import Program
from pyinfer.program.sparsity import DENSE, EXACT, OBSERVED, PREDICTED, FFNPlan, LayerPlan
from pyinfer.section import Entry, Section, SectionError, read_section

AUTO, CATS = "auto", "cats"
MODES = (AUTO, EXACT, PREDICTED, f"{CATS}=SHARE", DENSE)
ZEROING = ("relu", "relu2", "fatrelu", "drelu")  # activations that are exactly 0 for many neurons
MOST_CATS = 0.95

_NEW_PREDICTORS = "`pyinfer-convert predict` makes new ones"

Build = Callable[[FFNPlan], Program]  # raises FormatError, UnsupportedError
_T = TypeVar("_T")


def plan_ffn(
    file: GGUFFile, build: Build, sparsity: str = AUTO, observe: str | None = None
) -> tuple[FFNPlan, list[str]]:
    """The plan, and sentences that the user should read.

    build : the file's program with a plan;  sparsity : auto, exact, predicted, cats=SHARE or dense
    observe : one of OBSERVED; but for "stats" every layer is dense then, whatever `sparsity` says
    Raises InputError for what this model cannot do. A section or predictors that cannot be used are among the
    sentences.
    """
    mode, share = parse_sparsity(sparsity)
    if observe is not None and observe not in OBSERVED:
        raise InputError(f"observe is {observe!r}, expected one of {', '.join(OBSERVED)}")
    if mode == DENSE or (observe is not None and observe != "stats"):
        return FFNPlan(observe=observe), []
    facts = _Facts(file, build(FFNPlan()))
    if mode == AUTO:
        mode = facts.best()
    if mode == CATS:
        layers = facts.thresholded(share)
    elif mode == PREDICTED:
        layers = facts.predicted(build)
    elif mode == EXACT:
        if not facts.zeroing:
            raise InputError(
                f"{file.path}: sparsity is exact, but {facts.activation or 'its activation'} leaves no "
                f"neuron at zero; use {CATS}=0.25 (after pyinfer-convert profile) or {DENSE}"
            )
        layers = (LayerPlan(EXACT),) * facts.n_layers
    else:
        layers = ()
    return FFNPlan(layers, observe), facts.notices


def parse_sparsity(text: str) -> tuple[str, float]:
    """The mode, and the share of neurons for cats=SHARE. Raises InputError."""
    mode, _, share = text.partition("=")
    if mode == CATS:
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if not 0 < number <= MOST_CATS:
            raise InputError(f"sparsity is {text!r}, expected {CATS}= a number above 0 and up to {MOST_CATS}")
        return mode, number
    if share or mode not in MODES:
        raise InputError(f"sparsity is {text!r}, expected one of {', '.join(MODES)}")
    return mode, 0.0


def activation_of(program: Program) -> str:
    """The activation of the feed-forward layers of a dense program, without its threshold."""
    ops = [op for op in program.ops if op.name in ("gate", "activate")]
    return ops[-1].params["activation"].partition(":")[0] if ops else ""


def fires_rarely(program: Program) -> bool:
    """Whether the model's activation leaves most neurons at exactly 0 (ReLU and relatives)."""
    return activation_of(program) in ZEROING


class _Facts:
    """What a file says of its neurons."""

    def __init__(self, file: GGUFFile, dense: Program) -> None:
        self.file, self.notices = file, []
        self.activation = activation_of(dense)
        self.zeroing = fires_rarely(dense)
        self.n_layers = dense.cache.layers
        self.width, self.n_neurons = file.tensors[names.weight(names.FFN_UP, 0)].shape[:2]
        self.neuron_major = names.weight(names.FFN_DOWN_T, 0) in file.tensors
        self._section: Section | None = None
        self._lost: SectionError | None = None
        try:
            self._section = read_section(file)
        except SectionError as error:
            self._lost = error
            self.notices.append(self._without(error))

    def _without(self, error: SectionError) -> str:
        """What becomes of a model whose section cannot be used, and what to do."""
        if names.weight(names.FC1, 0) not in self.file.tensors:
            return str(error)
        remedy = "" if error.newer else f", and {_NEW_PREDICTORS}"
        return f"{error.found}; the model runs without it and without its predictors{remedy}"

    def best(self) -> str:
        """Predicted where there are predictors, exact where zeros are worth it, else dense."""
        if not (self.zeroing and self.neuron_major):
            return DENSE
        return PREDICTED if names.weight(names.FC1, 0) in self.file.tensors else EXACT

    def entry(self, name: str, read: Callable[[Entry, int, int], _T]) -> _T | None:
        """An entry of the section; None where there is none, or, with a sentence, where it does not fit."""
        if self._section is None or name not in self._section.entries:
            return None
        try:
            return read(self._section.entries[name], self.n_layers, self.n_neurons)
        except FormatError as error:
            rest = "; the model runs without it"
            if name == "predictors":  # whose errors end with: make new predictors
                rest = " with `pyinfer-convert predict`, as the model runs without these"
            self.notices.append(f"{self.file.path.name}: {error}{rest}")
            return None

    def thresholded(self, share: float) -> tuple[LayerPlan, ...]:
        """CATS: so much of |act(gate)| counts as zero, by the profile's histogram of each layer."""
        if self._lost is not None:
            remedy = "" if self._lost.newer else "; `pyinfer-convert profile --fresh` makes a new one"
            raise InputError(f"{self._lost.found}, and {CATS} needs the profile in it{remedy}")
        profile = self.entry("profile", Profile.from_entry)
        if profile is None or profile.histogram is None:
            raise InputError(
                f"{self.file.path}: {CATS} needs a profile of the activations; "
                f"make one with: pyinfer-convert profile {self.file.path} --text FILE"
            )
        return tuple(LayerPlan(EXACT, keep=profile.quantile(n, share)) for n in range(self.n_layers))

    def predicted(self, build: Build) -> tuple[LayerPlan, ...]:
        """By the file's predictors; exact, or dense, and a sentence, where they cannot be used."""
        without = (LayerPlan(EXACT if self.zeroing else DENSE),) * self.n_layers
        try:
            found = self._predictors()
            if found is None:
                return without
            forms, inputs, thresholds = found
            thresholds = np.where(self.hot(), np.float32(-np.inf), thresholds)
            layers = tuple(
                LayerPlan(PREDICTED, thresholds=each, form=form, input=source, apart=self.neuron_major)
                for form, source, each in zip(forms, inputs, thresholds)
            )
            build(FFNPlan(layers))  # which checks biases, and that the family has their input
        except (FormatError, UnsupportedError) as error:
            self.notices.append(f"{error}; the model runs without its predictors, and {_NEW_PREDICTORS}")
            return without
        return layers

    def _predictors(self) -> tuple[list[str], list[str], np.ndarray] | None:
        """Form and input of every layer's predictor, and thresholds float32 [L, F].

        None where their description is lost, of which a sentence speaks already: to take them for
        PowerInfer's would be wrong. Raises InputError where the file has none, FormatError where they do not
        fit.
        """
        ranks = predictor_ranks(self.file, self.n_layers, self.width, self.n_neurons)
        if ranks is None:
            raise InputError(
                f"{self.file.path} has no predictors; make some with: "
                f"pyinfer-convert predict {self.file.path} --text FILE, or use exact"
            )
        if self._lost is not None:
            return None

        def read(entry: Entry, n_layers: int, n_neurons: int) -> Predictors:
            found = Predictors.from_entry(entry, n_layers, n_neurons)
            found.agree_with(ranks)
            return found

        if self._section is not None and "predictors" in self._section.entries:
            predictors = self.entry("predictors", read)
            if predictors is None:
                return None
            forms, inputs = (
                [getattr(each, name) for each in predictors.layers] for name in ("form", "input")
            )
            return forms, inputs, predictors.thresholds
        if names.POWERINFER_SPARSE_THRESHOLD not in self.file.metadata and not self.file.powerinfer:
            raise FormatError(f"{self.file.path}: its predictors' thresholds are missing from its section")
        threshold = self.file.get(names.POWERINFER_SPARSE_THRESHOLD, 0.0)
        if not isinstance(threshold, float) or not math.isfinite(threshold):
            raise FormatError(f"{self.file.path}: {names.POWERINFER_SPARSE_THRESHOLD} is no finite number")
        level = np.full((self.n_layers, self.n_neurons), threshold, np.float32)
        return [RELU] * self.n_layers, [RAW] * self.n_layers, level

    def hot(self) -> np.ndarray:
        """bool [L, F]: neurons that are computed always, as a prediction would cost more than it saves."""
        placement = self.entry("placement", Placement.from_entry)
        profile = self.entry("profile", Profile.from_entry)
        if profile is not None and profile.histogram is not None:
            profile = None  # of an activation that is never 0
        counts, tokens = (None, 0) if profile is None else (profile.counts, profile.tokens)
        if placement is not None and placement.processor == ON_CPU:
            return placement.hot
        if placement is not None:
            no_gpu = 0  # bytes: these executors run on the processor
            sizes = model_bytes(self.file, max(1, placement.n_ctx))
            placement, notice = fit(placement, sizes, no_gpu, counts, tokens)
            self.notices += [f"{self.file.path.name}: {notice}"] if notice else []
            return placement.hot
        if counts is None:
            return np.zeros((self.n_layers, self.n_neurons), bool)
        return often(counts, tokens)
