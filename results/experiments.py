"""What is compared: the rows of the two published tables, and a regime in which gradients underflow."""

from __future__ import annotations

from dataclasses import dataclass

# The name of the rows in float32, which the others are compared with.
BASELINE = "float32"


@dataclass(frozen=True)
class Row:
    """One way to scale the loss.

    Attributes:
        name: of its folder.
        label: in tables.
        flags: options of train_multi.py.
        published: the mAP published for SSD512 on VOC; None where there is none.
    """

    name: str
    label: str
    flags: tuple[str, ...]
    published: str | None = None

    @property
    def is_baseline(self) -> bool:
        return self.name == BASELINE


@dataclass(frozen=True)
class Table:
    """Rows that are trained alike but for their loss scaling.

    Attributes:
        name: of its folder.
        title: its heading.
        flags: options of train_multi.py for all its rows.
        rows: what is compared.
        baseline: the table whose float32 row they are compared with, where they have none.
    """

    name: str
    title: str
    flags: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: str | None = None


@dataclass(frozen=True)
class Scale:
    """How large the experiments are.

    Attributes:
        flags: options of train_multi.py for all tables.
        tables: what is trained.
    """

    flags: tuple[str, ...]
    tables: tuple[Table, ...]


def row(
    name: str,
    label: str,
    method: str,
    *,
    dtype: str = "mixed16",
    published: str | None = None,
    **options: object,
) -> Row:
    flags = ["--dtype", dtype] + (["--loss-scale-method", method] if dtype != "float32" else [])
    for option, value in options.items():
        flags += [f"--{option.replace('_', '-')}", str(value)]
    return Row(name, label, tuple(flags), published)


def batch_8() -> tuple[Row, ...]:
    return (
        row(BASELINE, "FP32 baseline", "fixed", dtype="float32", published="0.7894"),
        row("none", "no loss scale", "fixed", init_scale=1, published="diverged"),
        row("fixed-8", "fixed 8", "fixed", init_scale=8, published="0.7883"),
        row("fixed-128", "fixed 128", "fixed", init_scale=128, published="0.7871"),
        row("fixed-256", "fixed 256", "fixed", init_scale=256, published="0.7836"),
        row("dynamic-10", "dynamic, interval 10", "fixed", dynamic_interval=10, published="0.7504"),
        row("dynamic-1000", "dynamic, interval 1000", "fixed", dynamic_interval=1000),
        row("adaptive", "adaptive (approx_range)", "approx_range", published="0.7927"),
        row(
            "adaptive-freq-10",
            "adaptive, freq=10",
            "approx_range",
            update_per_n_iteration=10,
            published="0.7924",
        ),
        row("auto", "adaptive (auto)", "auto"),
    )


def batch_32() -> tuple[Row, ...]:
    return (
        row(BASELINE, "FP32", "fixed", dtype="float32"),
        row("none", "no loss scale", "fixed", init_scale=1, published="diverged"),
        row("fixed-128", "fixed 128", "fixed", init_scale=128, published="0.8001"),
        row("dynamic-10", "dynamic, interval 10", "fixed", dynamic_interval=10, published="0.8017"),
        row("adaptive", "adaptive (approx_range)", "approx_range", published="0.8030"),
        row("auto", "adaptive (auto)", "auto"),
    )


def tiny_loss() -> tuple[Row, ...]:
    return (
        row("none", "no loss scale", "fixed", init_scale=1),
        row("fixed-128", "fixed 128", "fixed", init_scale=128),
        row("dynamic-10", "dynamic, interval 10", "fixed", dynamic_interval=10),
        row("dynamic-1000", "dynamic, interval 1000", "fixed", dynamic_interval=1000),
        row("adaptive", "adaptive (approx_range)", "approx_range"),
        row(
            "adaptive-unbounded",
            "adaptive (approx_range), no bounds",
            "approx_range",
            scale_upper_bound="none",
            accum_upper_bound="none",
        ),
        row("auto", "adaptive (auto)", "auto"),
    )


def tables(batch_8_flags: tuple[str, ...], batch_32_flags: tuple[str, ...]) -> tuple[Table, ...]:
    batch_8_flags = ("--batchsize", "8", *batch_8_flags)
    return (
        Table("batch-8", "Batch size 8", batch_8_flags, batch_8()),
        Table("batch-32", "Batch size 32", ("--batchsize", "32", *batch_32_flags), batch_32()),
        Table(
            "loss-2e-18",
            "Loss multiplied by 2^-18",
            ("--loss-multiplier", "2**-18", *batch_8_flags),
            tiny_loss(),
            # In float32 the multiplier changes nothing.
            baseline="batch-8",
        ),
    )


SCALES = {
    # Trained until the float32 row does not get better: a run takes up to four minutes on one core. A batch
    # of 32 sees somewhat more images than one of 8, with larger steps.
    "converged": Scale(
        ("--model", "small", "--dataset", "digits", "--log-interval", "50"),
        tables(
            ("--iteration", "1500", "--evaluation-interval", "150"),
            ("--iteration", "600", "--lr", "0.024", "--warm-up", "60", "--evaluation-interval", "60"),
        ),
    ),
    "voc": Scale(("--model", "ssd512", "--dataset", "voc", "--log-interval", "500"), tables((), ())),
}
