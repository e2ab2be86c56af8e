"""examples/train_distributed.py, except that rank 1 is killed before step STEP, in the first attempt of torchrun.

Run: torchrun ... killed_rank.py STEP ARGUMENTS OF THE EXAMPLE
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_distributed

draw = train_distributed.batch
fatal = int(sys.argv.pop(1))


def batch(step, *arguments):
    if step == fatal and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(step, *arguments)


train_distributed.batch = batch
train_distributed.main()
