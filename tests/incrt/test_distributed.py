"""Two processes decide alike: the same heads, directions and optimiser states, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import geomlib

SCRIPT = """
import hashlib, json, os, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from geomlib.incrt import GrowthConfig, GrowthController, SelfOrganisingEncoder, multi_offset_copy

def train(rank, world):
    draws = torch.Generator().manual_seed(0)
    model = SelfOrganisingEncoder(
        vocabulary=5, d=16, dk=6, dv=4, max_heads=4, prototypes=8, outputs=(2, 5), generator=draws
    )
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    config = GrowthConfig(
        theta=0.0, dwell=25, check_every=5, persistence=1, calibrate=(5, 5), prototypes_at=5, prune_checks=1,
        eps_out=1e9, phi_g=0.999,
    )
    # Unlike seeds: what is drawn has to come from one process.
    generator = torch.Generator().manual_seed(rank)
    controller = GrowthController(wrapped, optimizer, config, generator=generator)
    loss = model.structure_loss()
    data = multi_offset_copy(16 * 130, offsets=2, generator=torch.Generator().manual_seed(1))
    for step in range(130):
        x, y = (part[16 * step : 16 * step + 16][rank::world] for part in data)
        optimizer.zero_grad()
        loss(wrapped(x), y).backward()
        optimizer.step()
        controller.step()
        if step == 110:  # too high for any head: from now on they may go
            model.layers[0].growth.gate.theta.fill_(1e6)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "temperature" not in name:  # follows the tokens of a process, and is handed on before each pass
            digest.update(value.numpy().tobytes())
    for entries in optimizer.state_dict()["state"].values():
        for value in entries.values():
            digest.update(value.numpy().tobytes())
    events = [(event.kind, event.step, event.head) for event in controller.events]
    Ma = model.layers[0].growth.motor.Ma
    return {"digest": digest.hexdigest(), "events": events, "heads": model.heads, "motor": Ma.norm().item()}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = train(dist.get_rank(), dist.get_world_size())
    every = [None, None]
    dist.all_gather_object(every, found)
    if dist.get_rank() == 0:
        print("FOUND" + json.dumps(every))
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_grow_and_prune_alike(tmp_path):
    script = tmp_path / "grow.py"
    script.write_text(SCRIPT)
    output = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(geomlib.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    line = next(line for line in output.stdout.splitlines() if line.startswith("FOUND"))
    first, second = json.loads(line.removeprefix("FOUND"))
    assert first == second
    assert [kind for kind, *_ in first["events"]] == ["grow", "grow", "grow", "prune"]
    assert first["heads"] == [3]
    assert first["motor"] > 0
