"""Clips a second of training and of embedding, as a share of what the device's matrix products reach.

Run: ``python benchmarks/network.py [DEVICE] [BATCH]``; the device is cuda where there is one, else the CPU with one
thread. ResNet-18 and ResNet-50 as MitoReID has them, time retained, on clips of 3 × 16 × 112²; bfloat16 on a GPU,
float32 on a CPU. Clips are uint8 and on the device already: it is the network that is measured, not the loader
(benchmarks/train_loading.py). Floating-point operations are counted by torch; the rate that they are held against is
the best that large matrix products of the same type reach here, plain ones or, which may be faster on a CPU, as a
convolution of many channels.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from screening.embedding import EmbedConfig, embed
from screening.i3d import I3DResNet, ModelConfig
from screening.training import Normalisation, TrainConfig, TrainingState

CLIP = (3, 16, 112, 112)
CLASSES = 38
NORMALISATION = Normalisation(mean=(0.023, 0.060, 0.015), std=(0.042, 0.128, 0.032))
ROUNDS = 5


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median wall seconds of a call, after one that is not counted."""
    taken = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best large product."""
    rates = []
    for n in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
        rates.append(2 * n**3 / seconds(lambda a=a, b=b: a @ b, device))
    x, weight = (torch.randn(1024, *of, device=device, dtype=dtype) for of in ((8, 16, 16), (1024, 3, 3, 3)))
    x = x[None].contiguous(memory_format=torch.channels_last_3d)
    taken = seconds(lambda: functional.conv3d(x, weight, padding=1), device)
    rates.append(2 * x.numel() * weight[0].numel() / taken)
    return max(rates)


def operations(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def main(device: torch.device, batch: int) -> None:
    """Print a row a network and task."""
    on_gpu = device.type == "cuda"
    precision = "bf16" if on_gpu else "float32"
    name = torch.cuda.get_device_name() if on_gpu else f"one core of {platform.processor() or platform.machine()}"
    rate = matrix_rate(device, torch.bfloat16 if on_gpu else torch.float32)
    print(f"{name}, {precision}, torch {torch.__version__}, {batch} clips of {CLIP} at a time")
    print(f"matrix products reach {rate / 1e12:.3g} TFLOP/s")
    clips = torch.randint(0, 256, (batch, *CLIP), dtype=torch.uint8, device=device)
    label = torch.arange(batch, device=device) // 2 % CLASSES
    for depth, shortcut in ((18, "A"), (50, "B")):
        model = ModelConfig(depth=depth, shortcut=shortcut, temporal="retain")
        config = TrainConfig(precision=precision)
        state = TrainingState.make(
            model, config, NORMALISATION, n_classes=CLASSES, steps_per_epoch=1000, seed=0, device=device
        )
        network = I3DResNet(model, CLIP[0], CLASSES).to(device, memory_format=torch.channels_last_3d).eval()
        how = EmbedConfig(batch_size=batch, precision=precision)
        tasks: dict[str, Callable[[], object]] = {
            "embedding": lambda network=network, how=how: embed(network, clips, NORMALISATION, range(CLIP[1]), how),
            "training": lambda state=state: state.step(clips, label),
        }
        for task, function in tasks.items():
            work, taken = operations(function), seconds(function, device)
            print(
                f"ResNet-{depth} {task:<9} {batch / taken:9.1f} clips/s, {work / batch / 1e9:6.1f} GFLOP a clip: "
                f"{work / taken / rate:.0%} of the matrix rate",
                flush=True,
            )


if __name__ == "__main__":
    asked = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    main(asked, int(sys.argv[2]) if len(sys.argv) > 2 else 256 if asked.type == "cuda" else 4)
