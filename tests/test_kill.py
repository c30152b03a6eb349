"""A real process is killed with SIGKILL, at random moments and at the worst ones, and must end with the same bits.

Run it with `pytest tests/test_kill.py -s` to see the count.
"""
import multiprocessing, os, random, signal, time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from facegen.training import checkpoint
from facegen.data.faces import Face
from facegen.diffusion.losses import diffusion_loss
from facegen.diffusion.schedules import make_scheduler
from facegen.training.config import TrainConfig
from facegen.training.loop import train

TRIALS, STEPS = 20, 24
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['pytest', 'diffusers', 'facegen.training.loop', 'diffusers.models.unets.unet_2d'])


class Net(nn.Module):
    "A UNet with dropout and a trained embedding, as small as diffusers makes them"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet2DModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, dropout=.2,
            attention_head_dim=8, down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
            up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
        self.big = nn.Parameter(torch.ones(60_000)) # makes the checkpoint a megabyte, so that writing takes its time

    def forward(self, x, t, cond=None): return self.unet(x, t).sample*self.big.mean()


class Faces:
    def __init__(self, n=11):
        self.image, self.ids = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))*2 - 1, list(range(n))

    def __len__(self): return len(self.ids)

    def __getitem__(self, rows):
        n = len(rows)
        return Face(self.image[rows], torch.zeros(n, 40), torch.zeros(n, 8, 8, dtype=torch.int64))


def steps(folder, workers=0):
    cfg = TrainConfig(
        steps=STEPS, batch=4, micro=3, lr=1e-2, warmup=3, ema=.9, save_every=2, workers=workers, device='cpu')
    return train(Net(), Faces(), diffusion_loss(make_scheduler()), cfg, folder)


def child(folder, started, workers):
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True) # for the loader's workers: what a process of its own would use
    started.set()
    for _ in steps(folder, workers):
        pass


def dies_at(folder, name, call):
    "Train, and die in the `call`-th call of a function that writes; save_file dies with half of the file written"
    torch.set_num_threads(1)
    place = os if name == 'replace' else checkpoint
    real, calls = getattr(place, name), []
    def deadly(*args, **keys):
        calls.append(1)
        if len(calls) < call: return real(*args, **keys)
        if name == 'save_file':
            real(*args, **keys)
            os.truncate(args[1], os.path.getsize(args[1])//2)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(place, name, deadly)
    for _ in steps(folder):
        pass


def run(folder, delay=None, workers=0, aim=False):
    "Train in a process; kill it `delay` seconds after its start, or at the next checkpoint. Return its exit code"
    started = CONTEXT.Event()
    process = CONTEXT.Process(target=child, args=(folder, started, workers))
    process.start()
    assert started.wait(60)
    process.join(delay)
    while aim and process.is_alive() and not (Path(folder)/'state.tmp').exists():
        pass
    if delay is not None:
        process.kill()
    process.join()
    return process.exitcode


def same(a, b):
    (meta_a, a), (meta_b, b) = (checkpoint.read_tensors(folder/'state.safetensors') for folder in (a, b))
    if not meta_a['step'] == meta_b['step'] == STEPS: return False
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "The folder of a run that was left alone, and how long it took once it had started"
    folder = tmp_path_factory.mktemp('undisturbed')
    assert run(folder/'warm up') == 0
    start = time.perf_counter()
    assert run(folder) == 0
    return folder, time.perf_counter() - start


def disturbed(folder, seconds, chance, workers):
    "Kill a run one to three times, then let it end: (kills, how many of them left a half written checkpoint)"
    kills = writing = 0
    for _ in range(chance.randint(1, 3)):
        killed = run(folder, chance.uniform(0, .9*seconds), workers, aim=chance.random() < .5) == -signal.SIGKILL
        kills, writing = kills + killed, writing + (killed and (Path(folder)/'state.tmp').exists())
    assert run(folder, workers=workers) == 0
    return kills, writing


def test_killed_at_random_moments(undisturbed, tmp_path):
    (whole, seconds), chance, good, total, half = undisturbed, random.Random(0), 0, 0, 0
    for trial in range(TRIALS):
        kills = 0
        for attempt in range(9): # a process that ended before the signal came is no trial
            folder = tmp_path/f'{trial}_{attempt}'
            workers = int(trial % 5 == 0)  # orphaned workers need five seconds to notice
            kills, writing = disturbed(folder, seconds/2**attempt, chance, workers)
            if kills: break
        assert kills, 'the run is too short to be killed'
        good, total, half = good + same(whole, folder), total + kills, half + writing
    print(f'\n{good} of {TRIALS} bit-identical; {total} kills, {half} of them while it wrote a checkpoint')
    assert good == TRIALS and half > 0


@pytest.mark.parametrize('call', [1, 4])
@pytest.mark.parametrize('name', ['save_file', 'sync', 'replace'])
def test_killed_at_the_worst_moment(undisturbed, tmp_path, name, call):
    process = CONTEXT.Process(target=dies_at, args=(tmp_path, name, call))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run(tmp_path) == 0 and same(undisturbed[0], tmp_path) and not (tmp_path/'state.tmp').exists()


def test_the_comparison_can_fail(undisturbed, tmp_path):
    "One step less, and `same` must say so"
    generator = steps(tmp_path)
    for step in generator:
        if step.step == STEPS - 2: break
    assert not same(undisturbed[0], tmp_path)
