"""Combine plans, times, choices and advice in one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from stratagem._version import __version__
from stratagem.planning.advice import Advice, Choice, Replan, advise, best_choices, segments_of
from stratagem.planning.result import ModelFacts, Plan
from stratagem.planning.timing import Cluster, Estimate, estimate

__all__ = ["Report", "Section", "build_report"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """All strategies at one world size on one device.

    Attributes:
        world: the number of ranks.
        gpus_per_node: the number of ranks on a node.
        cluster: the device and its links.
        estimates: the strategies in the order of the plan.
        choices: the best of them.
        advice: what to try for the first choice; None if no strategy can train the model.
    """

    world: int
    gpus_per_node: int
    cluster: Cluster
    estimates: tuple[Estimate, ...]
    choices: tuple[Choice, ...]
    advice: Advice | None

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.world // self.gpus_per_node)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The plans of a model on one or several devices.

    Attributes:
        title: the name of the configuration or model.
        model: facts about the model.
        sections: one for each device and world size.
    """

    title: str
    model: ModelFacts
    sections: tuple[Section, ...]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The assumptions about all devices, one sentence each."""
        found = dict.fromkeys(each for section in self.sections for each in section.cluster.assumptions)
        return tuple(found)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the rates of devices and links."""
        found: dict[str, None] = {}
        for section in self.sections:
            cluster = section.cluster
            if cluster.device is not None:
                found[f"{cluster.device.name}: {cluster.device.source}"] = None
            if cluster.topology is not None:
                found |= {
                    f"{link.name}: {link.source}": None for link in (cluster.topology.inside, cluster.topology.across)
                }
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON. All sizes are bytes, and all times seconds."""
        return {
            "stratagem": __version__,
            "title": self.title,
            "model": asdict(self.model),
            "sections": [_section_as_dict(section) for section in self.sections],
            "assumptions": list(self.assumptions),
            "sources": list(self.sources),
        }


def build_report(title: str, plans: Sequence[tuple[Cluster, Plan]], *, replan: Replan | None) -> Report:
    """Return the report of plans.

    Args:
        title: the name of the configuration or model.
        plans: each device with the plan for its memory.
        replan: plans a variant of a step for the advice; None to give advice without new plans.
    """
    model = plans[0][1].model
    start_bytes = model.parameter_bytes + model.buffer_bytes
    sections = []
    for cluster, plan in plans:
        for world in dict.fromkeys(step.world for step in plan.steps):
            steps = [step for step in plan.steps if step.world == world]
            estimates = tuple(estimate(step, cluster, start_bytes=start_bytes) for step in steps)
            choices = best_choices(estimates)
            advice = advise(choices[0].estimate, estimates, replan) if choices else None
            sections.append(
                Section(
                    world=world,
                    gpus_per_node=min(world, steps[0].gpus_per_node),
                    cluster=cluster,
                    estimates=estimates,
                    choices=choices,
                    advice=advice,
                )
            )
    return Report(title=title, model=model, sections=tuple(sections))


def _section_as_dict(section: Section) -> dict[str, Any]:
    cluster = section.cluster
    return {
        "world": section.world,
        "nodes": section.nodes,
        "device": cluster.name,
        "memory": cluster.memory,
        "utilization": cluster.utilization,
        "links": None
        if cluster.topology is None
        else {
            level: {"name": link.name, "bytes_per_second": link.bytes_per_second, "latency": link.latency}
            for level, link in (("inside", cluster.topology.inside), ("across", cluster.topology.across))
        },
        "strategies": [_estimate_as_dict(each) for each in section.estimates],
        "choices": [{"label": each.estimate.step.label, "why": each.why} for each in section.choices],
        "advice": None if section.advice is None else _advice_as_dict(section.advice),
    }


def _estimate_as_dict(each: Estimate) -> dict[str, Any]:
    step, time, checkpoint = each.step, each.time, each.checkpoint
    return {
        **{key: value for key, value in asdict(step).items() if key != "collectives"},
        "memory": {**asdict(step.memory), "static": step.memory.static, "total": step.memory.total},
        "segments": segments_of(step.memory),
        "fits": each.fits,
        "free": each.free,
        "collectives": [
            {
                **asdict(part.planned),
                "level": part.level,
                "sent": part.sent,
                "sent_across": part.sent_across,
                "seconds": part.seconds,
            }
            for part in each.collectives
        ],
        "time": None if time is None else {**asdict(time), "shortest": time.shortest, "longest": time.longest},
        "no_time": each.no_time,
        "samples_per_second": each.samples_per_second,
        "checkpoint": None if checkpoint is None else asdict(checkpoint),
    }


def _advice_as_dict(advice: Advice) -> dict[str, Any]:
    return {
        "label": advice.estimate.step.label,
        "largest": advice.largest,
        "bytes": advice.nbytes,
        "suggestions": [asdict(each) for each in advice.suggestions],
        "untried": list(advice.untried),
    }
