"""A progress bar over training steps: losses, speed, time left, and AP when it is measured."""

from collections.abc import Iterable, Iterator

from mimdet.training.trainer import Step


def show_progress(steps: Iterable[Step], every: float = 1) -> Iterator[Step]:
    """Pass the steps on, drawing one tqdm line on standard output every so many seconds."""
    import sys

    from tqdm import tqdm

    bar = None
    try:
        for step in steps:
            if bar is None:
                bar = tqdm(
                    total=step.total,
                    initial=step.number - 1,
                    unit="step",
                    mininterval=every,
                    maxinterval=max(10, every),
                    file=sys.stdout,
                    dynamic_ncols=True,
                )
            bar.update()
            bar.set_postfix_str(
                f"loss {step.loss:.3g}, {step.images / step.seconds:.1f} img/s", refresh=False
            )
            if step.evaluation:
                bar.write(f"step {step.number}: {summary(step.evaluation)}")
            yield step
    finally:
        if bar is not None:
            bar.close()


def summary(evaluation: dict) -> str:  # type: ignore[type-arg]
    """`box AP 18.2, mask AP 14.9` of an evaluation's metrics; of an autoencoder its loss."""
    if "held_out" in evaluation:
        loss = evaluation["held_out"].get("loss")
        return "" if loss is None else f"loss of held-out images {loss:.4f}"
    parts = [
        f"{kind} AP {100 * evaluation[kind]['AP']:.1f}"
        for kind in ("box", "mask")
        if evaluation.get(kind)
    ]
    return ", ".join(parts)
