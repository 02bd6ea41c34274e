"""The training of `relufy`: distillation from the teacher's states, with a price on every firing neuron.

Loss per token = KL(teacher || student) on a sample of positions + STATE_WEIGHT * mean squared error of the
final state (relative to its mean square) + price * share of neurons that fire. A controller moves the price
so that the share follows a schedule.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyinfer.errors import FormatError
from pyinfer_tools.relufy_corpus import Corpus
from pyinfer_tools.relufy_files import write_atomically
from pyinfer_tools.relufy_model import Llama, kernels

STATE_WEIGHT = 0.3
EDGE = 0.25  # width of the smoothed step, in root mean squares of the neuron's gate
FIRST_THRESHOLD = 0.05  # in the same unit
WARM_STEPS = 30
PIECE_ROWS = 4  # what fits the caches of one core
CONTROL_GAIN, CONTROL_LIMIT = 0.03, 0.02  # of the logarithm of the price, per step
CONTROL_PULL = 3.0  # of the same, at once: damps what the gain alone would overshoot
PRICE_RANGE = (1e-3, 30.0)
AVERAGE_STEPS = 100  # about so many last steps are averaged


@dataclass(frozen=True)
class Plan:
    """What a run shall do; part of its checkpoint."""

    tokens: int
    minutes: float  # 0: no limit
    sparsity: float
    first_sparsity: float = 0.55
    ramp_until: float = 0.5  # part of the run after which the wanted sparsity stands
    rows: int = 16
    scored: float = 0.5  # share of positions where the KL is taken
    rate: float = 1e-4
    threshold_rate: float = 5e-3
    threads: int = 2
    seed: int = 0

    def wanted_sparsity(self, part: float) -> float:
        """At `part` (0 to 1) of the run."""
        rise = min(part / self.ramp_until, 1.0)
        return min(self.first_sparsity, self.sparsity) * (1 - rise) + self.sparsity * rise

    def rate_factor(self, part: float, step: int) -> float:
        """Warm-up, then a straight line to zero at the end."""
        return min(1.0, (step + 1) / WARM_STEPS) * (1 - part)


@dataclass
class Progressed:
    """How far a run is; part of its checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log_price: float = math.log(0.03)
    active: float = 0.5  # smoothed share of neurons that fire
    divergence: float = 0.0  # smoothed KL
    error: float = 0.0  # smoothed mean squared error of states


class Trainer:
    """Owns the student (float32), its copy in bfloat16 that computes, and the optimiser.

    average : the student with the mean weights of the last steps: what is judged and exported, because most
    of the distance between one step's weights and good ones is noise of the batches
    """

    def __init__(self, student: Llama, head: Tensor, plan: Plan, corpus: Corpus) -> None:
        """head [V', D] : the rows of the head over which the KL is taken."""
        self.student, self.plan, self.corpus = student, plan, corpus
        self.head = head.to(torch.bfloat16)
        self.device = head.device
        on_cpu = self.device.type == "cpu"
        self.pool = ThreadPoolExecutor(plan.threads if on_cpu else 1)
        self.piece_rows = PIECE_ROWS if on_cpu else plan.rows
        self.done = Progressed()
        self.edges = torch.ones_like(student.theta)
        self.work = Llama(student.shape, sparse=True).to(self.device)
        trained = [(n, p) for n, p in student.named_parameters() if n not in ("embedding", "head")]
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        work = dict(self.work.named_parameters())
        for name, own in student.named_parameters():
            work[name].data = own.data.to(torch.bfloat16) if own.ndim == 2 and name != "theta" else own.data
            own.requires_grad_(any(own is p for _, p in trained))
            work[name].requires_grad_(own.requires_grad)
        self.pairs = [(p, work[n]) for n, p in trained]
        # thresholds are learned as logarithms: they stay positive, and a step is relative
        self.log_theta = nn.Parameter(torch.zeros_like(student.theta))
        rest = [p for n, p in trained if n != "theta"]
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.average_log_theta = torch.zeros_like(student.theta)
        self.mean_pairs = [(p, self.average.get_parameter(n)) for n, p in trained if n != "theta"]
        self.mean_pairs.append((self.log_theta, self.average_log_theta))
        self.optimiser = torch.optim.AdamW(
            [{"params": rest, "base": plan.rate}, {"params": [self.log_theta], "base": plan.threshold_rate}],
            betas=(0.9, 0.98),
            weight_decay=0.0,
            eps=1e-10,
            fused=True,
        )

    def prepare(self) -> None:
        """First thresholds and edges, from the gates of the untrained student."""
        scale = self.gate_scale()
        self.edges = EDGE * scale
        with torch.no_grad():
            self.log_theta.copy_((FIRST_THRESHOLD * scale).log())
        self._publish()
        self._restart_average()

    @torch.no_grad()
    def _restart_average(self) -> None:
        for own, mean in self.mean_pairs:
            mean.copy_(own)
        self.average.theta.copy_(self.average_log_theta.exp())

    @torch.no_grad()
    def gate_scale(self) -> Tensor:
        """Root mean square of every gate [layers, F] on some rows."""
        tokens = torch.from_numpy(np.array(self.corpus.tokens[:16])).long().to(self.edges.device)
        squares: list[Tensor] = []
        hooks = []
        for layer in self.student.layers:
            original = layer.gates

            def record(x: Tensor, original: Callable[..., Any] = original) -> tuple[Tensor, Tensor]:
                z, u = original(x)
                squares.append(z.square().mean(0))
                return z, u

            layer.gates = record
            hooks.append((layer, original))
        self.student(tokens)
        for layer, _ in hooks:
            del layer.gates
        return torch.stack(squares).sqrt().clamp_(min=1e-4)

    def _publish(self) -> None:
        """Copy the float32 weights to where they are used."""
        with torch.no_grad():
            self.student.theta.copy_(self.log_theta.exp())
            for own, used in self.pairs:
                if own.data_ptr() != used.data_ptr():
                    used.copy_(own)

    def part(self) -> float:
        """How much of the run is over, 0 to 1: by tokens or by minutes, whichever is further."""
        part = self.done.tokens / self.plan.tokens
        if self.plan.minutes:
            part = max(part, self.done.seconds / (60 * self.plan.minutes))
        return min(part, 1.0)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and teacher states of this step: a new order of all rows in every epoch."""
        rows, size = self.corpus.rows_done, self.plan.rows
        steps = rows // size
        epoch, index = divmod(self.done.step, steps)
        order = np.random.default_rng([self.plan.seed, epoch]).permutation(rows)
        picked = np.sort(order[index * size : (index + 1) * size])
        states = torch.from_numpy(self.corpus.states[picked].view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self.corpus.tokens[picked]).long().to(self.device), states.to(self.device)

    def step(self) -> None:
        """One batch: forward, backward, update of weights and price."""
        began = time.perf_counter()
        plan, done = self.plan, self.done
        part = self.part()
        tokens, target = self.batch()
        slots = tokens.numel() * self.edges.numel()
        pull = max(-1.0, min(1.0, CONTROL_PULL * self._excess()))
        price = torch.tensor(math.exp(done.log_price + pull) / slots, device=self.device)
        starts = range(0, len(tokens), self.piece_rows)
        pieces = [slice(start, min(start + self.piece_rows, len(tokens))) for start in starts]
        results = list(
            self.pool.map(
                lambda index: self._piece(
                    index, tokens[pieces[index]], target[pieces[index]], price, len(tokens)
                ),
                range(len(pieces)),
            )
        )
        self._update([r[0] for r in results], plan.rate_factor(part, done.step))
        fired, divergence, error = (sum(float(r[n]) for r in results) for n in (1, 2, 3))
        self._control(fired / slots)
        keep = 0.98 if done.step else 0.0
        done.divergence = keep * done.divergence + (1 - keep) * divergence
        done.error = keep * done.error + (1 - keep) * error
        done.step += 1
        done.tokens += tokens.numel()
        done.seconds += time.perf_counter() - began

    def _piece(
        self, index: int, tokens: Tensor, target: Tensor, price: Tensor, rows: int
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Gradients by one piece of the batch, and its part of fired, divergence and error.

        Each piece is computed by one thread: that leaves no barrier after every operation, which costs most
        of the time where other programs use the machine too.
        """
        state, fired = self.work(tokens, edges=self.edges, price=price)
        state, target = state.flatten(0, 1), target.flatten(0, 1)
        generator = torch.Generator().manual_seed((self.plan.seed + self.done.step) * 1009 + index)
        picked = torch.randperm(len(state), generator=generator)[: max(1, int(len(state) * self.plan.scored))]
        weight = len(tokens) / rows
        error = weight * F.mse_loss(state, target.float()) / target.float().square().mean()
        divergence = weight * HeadDivergence.apply(state[picked], target[picked], self.head)
        gradients = torch.autograd.grad(divergence + STATE_WEIGHT * error, [w for _, w in self.pairs])
        return list(gradients), fired.sum(), divergence.detach(), error.detach()

    @torch.no_grad()
    def _update(self, gradients: list[list[Tensor]], factor: float) -> None:
        for place, (own, _) in enumerate(self.pairs):
            total = sum(piece[place].float() for piece in gradients)  # in a fixed order
            if own is self.student.theta:
                self.log_theta.grad = total * own
            else:
                own.grad = total
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * factor
        nn.utils.clip_grad_norm_(self.optimiser.param_groups[0]["params"], 1.0)
        self.optimiser.step()
        self._publish()
        weight = max(1 / AVERAGE_STEPS, 1 / (self.done.step + 1))
        for own, mean in self.mean_pairs:
            mean.lerp_(own, weight)
        self.average.theta.copy_(self.average_log_theta.exp())

    def _excess(self) -> float:
        """How many more neurons fire than wanted, as a part of those wanted."""
        return self.done.active / (1 - self.plan.wanted_sparsity(self.part())) - 1

    def _control(self, share: float) -> None:
        done = self.done
        done.active = share if done.step == 0 else 0.9 * done.active + 0.1 * share
        done.log_price += max(-CONTROL_LIMIT, min(CONTROL_LIMIT, CONTROL_GAIN * self._excess()))
        done.log_price = min(max(done.log_price, math.log(PRICE_RANGE[0])), math.log(PRICE_RANGE[1]))

    def save(self, path: Path) -> None:
        """Everything that the next step depends on."""
        content = io.BytesIO()
        torch.save(
            {
                "plan": asdict(self.plan),
                "done": asdict(self.done),
                "weights": {n: p.detach() for n, p in self.student.named_parameters() if p.requires_grad},
                "log_theta": self.log_theta.detach(),
                "average": [mean for _, mean in self.mean_pairs],
                "edges": self.edges,
                "optimiser": self.optimiser.state_dict(),
            },
            content,
        )
        write_atomically(path, content.getvalue())

    def load(self, path: Path) -> None:
        """Go on where `save` was called; the plan may have changed since. Raises FormatError."""
        try:
            saved = torch.load(path, weights_only=True, map_location=self.device)
            fits = saved["log_theta"].shape == self.log_theta.shape
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError):
            raise FormatError(f"{path}: no state of relufy; give one of its folder training") from None
        if not fits:
            raise FormatError(f"{path}: the state of another teacher; give one of its folder training")
        with torch.no_grad():
            for name, own in self.student.named_parameters():
                if own.requires_grad:
                    own.copy_(saved["weights"][name])
            self.log_theta.copy_(saved["log_theta"])
        self.edges = saved["edges"]
        self.optimiser.load_state_dict(saved["optimiser"])
        for group, base in zip(self.optimiser.param_groups, (self.plan.rate, self.plan.threshold_rate)):
            group["base"] = base
        self.done = Progressed(**saved["done"])
        self._publish()
        self._restart_average()
        with torch.no_grad():
            for (_, mean), value in zip(self.mean_pairs, saved.get("average", ())):
                mean.copy_(value)
            self.average.theta.copy_(self.average_log_theta.exp())


class HeadDivergence(torch.autograd.Function):
    """Mean KL(teacher || student) of the next token, from states [N, D] and the head [V, D] (bfloat16).

    The student's logits are computed as the teacher's plus the head applied to the difference of the states:
    then the rounding of the large common part cancels.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, target: Tensor, head: Tensor) -> Tensor:
        logits = F.linear(target, head), F.linear(state.to(head.dtype) - target, head)
        divergence, difference = kernels.divergence(*logits)
        ctx.save_for_backward(difference, head)
        return divergence / len(state)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        difference, head = ctx.saved_tensors
        return (difference @ head).float() * (upstream / len(difference)), None, None
