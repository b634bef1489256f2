"""Runs cases in one process group and writes what each came to: torchrun run.py FOLDER [NAME ...].

A rank that fails a case ends, since the others may wait for it, and torchrun ends them.
"""

import datetime as dt
import gc
import json
import sys
import traceback
from pathlib import Path

import torch
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import CASES


def main(folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    path = Path(folder) / f"rank{dist.get_rank()}.json"
    outcomes = {}
    for case in CASES[dist.get_world_size()]:
        if names and case.__name__ not in names:
            continue
        torch.manual_seed(0)
        try:
            case()
        except Exception:  # noqa: BLE001
            outcomes[case.__name__] = traceback.format_exc()
            path.write_text(json.dumps(outcomes))
            sys.exit(1)
        outcomes[case.__name__] = ""
        path.write_text(json.dumps(outcomes))
    gc.collect()  # a sharded model that lives on keeps its process group's threads running
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
