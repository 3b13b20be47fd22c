"""train.py: how fast the decoder trains, through the renderer."""

from __future__ import annotations

from typing import Any

import torch
from _train_bench import PREDICTED, Bench, attempt, config_of, per_step, profiled, synthetic

from fresnel.host import machine as surroundings
from fresnel.training.step import Stepper, kernels

DECODER_TARGET = 3000  # views/s, on one H100


def decoder_task(bench: Bench, objects: int, pixels: int, channels: int) -> Any:
    from fresnel.models.decoder import DecoderConfig
    from fresnel.training.decoder_task import DecoderTask

    views = synthetic(64, 8, pixels, bench.device)
    torch.manual_seed(0)
    network = DecoderConfig(image_size=pixels, base_channels=channels)
    return DecoderTask(views, network, batch_size=objects, target_views=3, device=bench.device)


def section_decoder(bench: Bench) -> None:
    objects, pixels, channels = (16, 128, 40) if bench.gpu else (4, 64, 24)
    views = objects * 4
    bench.say(
        f"Decoder, {objects} objects x 4 views, {pixels} px, two Gaussians a pixel; wanted on an "
        f"H100: {DECODER_TARGET:,} views/s."
    )
    bench.say("")
    bench.say("| lever | views/s | ms a step | predicted | measured | peak GB |")
    bench.say("|:--|--:|--:|--:|--:|--:|")
    first = 0.0
    stepper: Any = None

    def row(name: str, stepper: Stepper) -> None:
        nonlocal first
        seconds = per_step(bench, stepper, 0, 50 if bench.gpu else 5)
        first = first or seconds
        memory = surroundings.peak_memory(bench.device) / 1e9
        bench.say(
            f"| {name} | {views / seconds:,.0f} | {seconds * 1e3:.1f} | "
            f"{PREDICTED.get(name, 1.0):.1f}x | {first / seconds:.2f}x | {memory:.1f} |"
        )
        bench.figures[name] = {"views_per_s": views / seconds, "step_s": seconds, "gb": memory}

    def measured(name: str, graphs: bool, compiled: bool) -> None:
        nonlocal stepper
        torch.compiler.reset()
        surroundings.reset_peak_memory(bench.device)
        config = config_of(bench, graphs=graphs)
        stepper = Stepper(decoder_task(bench, objects, pixels, channels), config)
        if compiled:
            compile_s = stepper.compile()
            notes.append(f"{name}: compiling took {compile_s:.0f} s; {stepper.compiled}.")
        row(name, stepper)
        for part, function in getattr(stepper.task, "hot", {}).items():
            if getattr(function, "refused", None):
                notes.append(f"{name}: {part} not recorded: {function.refused}")

    notes: list[str] = []
    with kernels(False, bench.device):
        attempt(bench, "eager", measured, "eager", False, False)
        if not bench.quick:
            attempt(bench, "compiled", measured, "compiled", False, True)
        if bench.gpu:
            attempt(bench, "parts recorded", measured, "parts recorded", True, False)
            if not bench.quick:
                name = "compiled, parts recorded"
                attempt(bench, name, measured, name, True, True)
        for note in notes:
            bench.say("")
            bench.say(note)
        bench.say("")
        attempt(bench, "profile", profiled, bench, stepper, 0)
