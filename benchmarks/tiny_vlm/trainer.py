"""One training: model, optimizer, and how far it has come."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Batches
from .losses import Seeing, answering
from .model import build, trained
from .plans import Plan
from .prompt import Prompter
from .prose import tokens
from .schedule import Budget, rates
from .tiles import Painter

EVERY = 5
"""Steps between two points of the curve."""

Point = dict[str, Any]


class Trainer:
    """A training that can stop anywhere and go on.

    Args:
        plan: what to train on.
        decoder: the language model, float32.
        tokenizer: its tokenizer.
        painter: draws tiles.
        device: where to train; on CUDA in bfloat16.
        workers: processes that make batches.
        fuse: compile layers with Inductor.
    """

    def __init__(
        self, plan: Plan, decoder: Any, tokenizer: Any, painter: Painter, device: torch.device,
        workers: int = 0, fuse: bool = False,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.painter = painter
        self.prompter = Prompter(tokenizer)
        self.text = tokens(tokenizer, "calibration")
        self.device = device
        self.workers = workers
        self.model = build(decoder, tokenizer, plan.sizes, plan.seed).to(device)
        names = [self.prompter.tokens(painter.label(thing)) for thing in painter.things["seen"]]
        table = self.model.get_input_embeddings().weight.detach().cpu()
        digits = [self.prompter.tokens(str(digit))[0] for digit in range(10)]
        self.seeing = Seeing(table, names, digits).to(device)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98), weight_decay=0.0)
        self.stage = 0
        self.step = 0
        self.seconds = 0.0
        self.curve: list[Point] = []
        # Made before there are workers: each of them would make its own.
        self.backgrounds = painter.backgrounds
        if fuse:
            # Of any shape: Inductor would take minutes for each length of rows.
            language, vision = self.model.model.text_model, self.model.model.vision_model
            for layer in [*language.layers, *vision.encoder.layers]:
                layer.compile(dynamic=True)

    def _groups(self) -> list[dict[str, Any]]:
        parts: dict[str, list[nn.Parameter]] = {"vision": [], "connector": [], "change": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = "vision" if "vision_model" in name else "connector"
                parts["change" if name.endswith((".up", ".down")) else part].append(parameter)
        parts["connector"] += list(self.seeing.parameters())
        decay = {"vision": 0.05, "connector": 0.0, "change": 0.0}
        return [
            {"params": some, "name": part, "weight_decay": decay[part]}
            for part, some in parts.items()
        ]

    def run(
        self, budget: Budget, stop: Callable[[], bool], report: Callable[[Point], None]
    ) -> bool:
        """Train until all is done, or until it shall stop.

        Args:
            budget: of the whole training, over all calls.
            stop: asked before each step.
            report: gets each point of the curve.

        Returns:
            Whether all is done.
        """
        while self.stage < len(self.plan.stages):
            if not self._run_stage(budget, stop, report):
                return False
            self.stage, self.step, self.seconds = self.stage + 1, 0, 0.0
        return True

    def _run_stage(
        self, budget: Budget, stop: Callable[[], bool], report: Callable[[Point], None]
    ) -> bool:
        data = Batches(self.plan, self.stage, self.painter, self.prompter, self.text)
        loader = data.loader(self.step, self.workers, self.device.type == "cuda")
        share = self.plan.stages[self.stage].share
        sums = Sums()
        began = time.monotonic() - self.seconds
        for batch in loader:
            done = budget.done(share, self.seconds, self.step)
            if done >= 1 or stop():
                return done >= 1
            loss, right = self.update(batch, done)
            sums.add(loss, right, batch)
            self.step += 1
            if self.step % EVERY == 0:
                point = {"stage": self.plan.stages[self.stage].name, "step": self.step}
                point |= sums.take() | {"seconds": round(time.monotonic() - began, 1)}
                self.curve.append(point)
                report(point)
            self.seconds = time.monotonic() - began
        raise RuntimeError("batches have no end")

    def update(self, batch: Batch, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the optimizer."""
        now = rates(self.plan, self.stage, done, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = getattr(now, group["name"])
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            if self.plan.stages[self.stage].lengths:
                loss, right = answering(self.model, batch)
            else:
                loss, right = self.seeing(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        self.optimizer.step()
        return loss.detach(), right

    def save(self, path: Path) -> None:
        """Write everything that going on needs, whole or not at all."""
        content = {
            "model": trained(self.model),
            "seeing": self.seeing.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "at": (self.stage, self.step, self.seconds),
            "curve": self.curve,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        torch.save(content, draft)
        os.replace(draft, path)

    def resume(self, path: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        content = torch.load(path, map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in trained(self.model).items():
                parameter.copy_(content["model"][name])
        self.seeing.load_state_dict(content["seeing"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.stage, self.step, self.seconds = content["at"]
        self.curve = content["curve"]


class Sums:
    """Means over some steps, added up on the device, so that nothing waits for it."""

    def __init__(self) -> None:
        self.loss: list[Tensor] = []
        self.right: dict[str, list[Tensor]] = {}
        self.tiles = self.tokens = 0
        self.began = time.monotonic()

    def add(self, loss: Tensor, right: dict[str, Tensor], batch: Batch) -> None:
        """Count a step."""
        self.loss.append(loss)
        for name, value in right.items():
            self.right.setdefault(name, []).append(value)
        self.tiles += len(batch["tiles"])
        self.tokens += batch["ids"].numel() if "ids" in batch else 0

    def take(self) -> Point:
        """The means since the last time."""
        point: Point = {"loss": float(torch.stack(self.loss).mean())}
        for name, values in self.right.items():
            mean = float(torch.stack(values).nanmean())
            point |= {name: round(mean, 4)} if mean == mean else {}
        passed = time.monotonic() - self.began
        point |= {"tiles/s": round(self.tiles / passed), "tokens/s": round(self.tokens / passed)}
        self.__init__()  # type: ignore[misc]
        return point
