"""A job of two processes is stopped politely and resumed; an impolite end is not taken for one."""

import json
import time

from mimdet.training.job import JOB, Job
from mimdet.training.owner import process_of, read_status
from mimdet.training.run import CheckpointStore
from tests.small import small, still_running

STEPS = 30


def test_two_processes_stop_together_and_go_on(tmp_path) -> None:
    cfg = small(STEPS)
    cfg.training.evaluate_every_steps = STEPS
    run = tmp_path / "run"
    job = Job.start(cfg, run, processes=2)
    end = time.monotonic() + 250
    while job.state().step < 2:
        assert time.monotonic() < end and job.running(), "\n".join(job.log())
        time.sleep(0.05)
    about = json.loads((run / JOB).read_text())
    family = [process_of(about), *process_of(about).children(recursive=True)]
    assert len(family) >= 3  # torchrun and its two
    assert process_of(read_status(run)) in family[1:]  # its first process trains
    assert Job.attach(run).stop()
    stopped = job.wait(120)
    assert stopped.name == "stopped" and 2 <= stopped.step < STEPS, "\n".join(job.log())
    assert CheckpointStore(run / "checkpoints").steps()[-1] == stopped.step
    assert still_running(family) == []
    job.resume(processes=1)  # another number: the step is shared differently
    done = job.wait(200)
    assert done.name == "finished" and done.step == STEPS
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
