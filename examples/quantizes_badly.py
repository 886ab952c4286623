"""Why does my model quantize badly? From a bad figure to the channel and the token that cause it.

Run: ``python examples/quantizes_badly.py MODEL`` with a folder or hub name of a transformers decoder. Without MODEL the
script trains a softmax and a softpick model first (five minutes on one core; ``--steps 100`` for a quick look, in which
softmax has hardly any sinks yet) and puts them side by side.
Needs: ``pip install '.[quantize]'``. Nothing is downloaded for the default.
"""

import argparse
import tempfile
from pathlib import Path

from softpick.analysis.audit import AuditSettings, audit
from softpick.quantization.quantize import QuantizeSettings, quantize
from softpick.training.compare import Settings, compare

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("model", nargs="*", help="one or two models")
arguments.add_argument("--steps", type=int, help="training steps of the default models")
arguments.add_argument("--samples", type=int, default=64, help="sequences that are measured")
options = arguments.parse_args()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = options.model
        if not models:
            settings = Settings.for_task("text", steps=options.steps)
            compare(settings, Path(folder) / "compare")
            models = [str(Path(folder) / "compare" / f"{name}-seed0") for name in settings.normalizers]
        symptom(models, Path(folder) / "quantize")
        cause(models)


def symptom(models: list[str], folder: Path) -> None:
    """What does rounding weights and activations to 8 bits cost, by how many numbers share a scale?"""
    report = quantize(
        QuantizeSettings(
            model=models[0],
            against=tuple(models[1:]),
            methods=(),
            activations=("int8-tensor", "int8-token"),
            kv_cache=(),
            samples=options.samples,
        ),
        folder,
    )
    for run in report["runs"]:
        base = run["cells"][0]["perplexity"]
        print(f"\n{run['title']}: perplexity {base:.2f}")
        for cell in run["cells"][1:]:
            rounded = cell["perplexity"]
            print(f"  {cell['title']:45s} {rounded:8.2f} ({100 * (rounded / base - 1):+.2f} %)")


def cause(models: list[str]) -> None:
    """Which number is so large that the others lose their bits, on which token, and do heads put their weight there?"""
    settings = AuditSettings(
        model=models[0],
        against=models[1] if len(models) > 1 else None,
        samples=options.samples,
        sequence_length=64,
        knockout=(),
    )
    for run in audit(settings)["runs"]:
        measured = run["measurements"]
        sinks, hidden = measured["sink"]["first"]["rate"]["0.3"], measured["hidden"]
        print(f"\n{run['title']}: kurtosis of hidden states {hidden['kurtosis']:.1f} (a Gaussian has 3)")
        print(f"  heads that put more than 0.3 of their weight on the first token: {sinks:.1f} %")
        for layer in hidden["per_layer"]:
            top = layer["top"][0]
            print(
                f"  layer {layer['layer']}: largest |x| {abs(top['value']):.2f}, "
                f"{abs(top['value']) / layer['median_abs']:.0f} times the median, "
                f"in channel {top['channel']} at position {top['position']}"
            )


main()
