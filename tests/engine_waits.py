"""Started by accelerate in finetune.py's place: trains as it does, and rank 0 writes to WAITS (JSON) what made the host wait in steps 4 and 5.

On a GPU each of these holds the host until the device is done: a tensor's value asked for (item(), bool(), an if) and DeepSpeed's
synchronize(). tolist() on a CPU is not seen.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
from torch.utils._python_dispatch import TorchDispatchMode

from surefoot.config import Config
from surefoot.run import run
from surefoot.training.loop import SurefootTrainer

FIRST, LAST = 4, 5  # steps, each from behind the one before
waits: list[str] = []
plain_end = SurefootTrainer._maybe_log_save_evaluate
device = type(deepspeed.accelerator.get_accelerator())


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_local_scalar_dense":
            note()
        return func(*args, **(kwargs or {}))


def note(*_: object) -> None:
    waits.extend(traceback.format_list(traceback.extract_stack()[-6:-2]))


def end(self: SurefootTrainer, *args: Any, **named: Any) -> None:
    plain_end(self, *args, **named)
    if self.state.global_step == FIRST - 1:
        device.synchronize = note
        watch.__enter__()
    if self.state.global_step == LAST:
        watch.__exit__(None, None, None)
        waits.append("watched")


watch = Watch()
SurefootTrainer._maybe_log_save_evaluate = end  # type: ignore[method-assign]
run(Config.parse(dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])))
if os.environ["RANK"] == "0":
    Path(os.environ["WAITS"]).write_text(json.dumps(waits))
