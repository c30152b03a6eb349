"""Two processes train as one does. `accelerate launch` starts this very file twice, on the CPU.

The launcher needs the word `--multi_gpu`, though no GPU is there. In accelerate 1.15 only that word (or a config file
that says MULTI_GPU) leads to torch.distributed.run, which starts processes. `--cpu`, and a config file that says
MULTI_CPU, lead to a starter that runs the script once, whatever `--num_processes` says, and leaves more to mpirun;
`--multi_gpu --cpu` is refused. That the processes then talk through gloo is `train`'s choice: with device='cpu' it asks
its Accelerator for the CPU, and that finds LOCAL_RANK set.
"""
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from facegen.core import seed_all
from facegen.models.dit import make_dit
from facegen.data.faces import Face
from facegen.diffusion.losses import diffusion_loss
from facegen.diffusion.schedules import make_scheduler
from facegen.training.config import TrainConfig
from facegen.training.checkpoint import checksum
from facegen.synthetic.toyfaces import render_faces
from facegen.training.loop import train
from facegen.models.unet import make_unet

REPO, STEPS, BATCH = Path(__file__).parents[1], 8, 5 # five faces: two processes cannot share them equally
NETS = dict(
    unet=lambda: make_unet('smoke', 32),
    dit=lambda: make_dit('smoke', 32),
    dropout=lambda: make_unet('smoke', 32, dropout=.2))


class Few:
    "Eleven toy faces"
    def __init__(self):
        self.face = render_faces(n=11, size=32, seed=3)
    def __len__(self): return 11
    def __getitem__(self, rows): return Face(*(x[rows] for x in self.face))


def follow(name, folder, rank=0):
    "Train a network, the second process from weights of its own; what this process saw of it"
    torch.set_num_threads(1)
    seed_all(rank)
    model, sizes, noise = NETS[name](), [], diffusion_loss(make_scheduler())
    def loss(model, face, rng):
        sizes.append(len(face.image))
        return noise(model, face, rng)
    cfg = TrainConfig(
        steps=STEPS, batch=BATCH, lr=3e-3, warmup=2, decay='constant', ema=.9, device='cpu', save_every=STEPS)
    steps = list(train(model, Few(), loss, cfg, Path(folder)/name))
    return dict(
        loss=[s.loss for s in steps], norm=[s.grad_norm for s in steps], sizes=sizes,
        weights=checksum(model.state_dict()))


if __name__ == '__main__':
    rank, folder = int(os.environ['RANK']), Path(sys.argv[1])
    seen = {name: follow(name, folder, rank) for name in NETS}
    seen['backend'], seen['world'] = torch.distributed.get_backend(), torch.distributed.get_world_size()
    (folder/f'{rank}.json').write_text(json.dumps(seen | dict(pid=os.getpid())))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What both processes saw, and the folder with their checkpoints"
    folder = tmp_path_factory.mktemp('two')
    words = ('--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no '
             '--dynamo_backend no --main_process_port 0').split()
    done = subprocess.run(
        [sys.executable, '-m', 'accelerate.commands.launch', *words, __file__, folder], capture_output=True, text=True,
        timeout=180, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(REPO)))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder/f'{rank}.json').read_text()) for rank in (0, 1)], folder


def test_there_are_two_and_they_share_the_work(two):
    (a, b), _ = two
    assert a['pid'] != b['pid'] and (a['backend'], a['world']) == (b['backend'], b['world']) == ('gloo', 2)
    for name in NETS:
        assert (a[name]['sizes'], b[name]['sizes']) == ([2]*STEPS, [3]*STEPS), 'faces of each step: five in all'


@pytest.mark.parametrize('name', NETS)
def test_both_have_one_network(two, name):
    "The same losses and weights, bit for bit, though the second process began with weights of its own"
    (a, b), _ = two
    assert {k: v for k, v in a[name].items() if k != 'sizes'} == {k: v for k, v in b[name].items() if k != 'sizes'}


@pytest.mark.parametrize('name', ['unet', 'dit'])
def test_two_are_as_good_as_one(two, tmp_path, name):
    """The loss curve to 1e-5, and what is saved. A bias of keys moves no answer of attention: its gradient is rounding,
    which Adam makes as large as any other step"""
    (a, _), folder = two
    one = follow(name, tmp_path)
    assert one['sizes'] == [BATCH]*STEPS and one['loss'][-1] < one['loss'][0] - .02
    assert a[name]['loss'] == pytest.approx(one['loss'], abs=1e-5)
    assert a[name]['norm'] == pytest.approx(one['norm'], rel=1e-4)
    saved, whole = [load_file(f/name/'state.safetensors') for f in (folder, tmp_path)]
    assert saved.keys() == whole.keys()
    for k in saved:
        atol = 3e-3 if k.endswith('to_k.bias') else 1e-5
        torch.testing.assert_close(saved[k], whole[k], rtol=1e-4, atol=atol, msg=lambda m: f'{k}: {m}')


def test_dropout_is_each_process_s_own(two, tmp_path):
    "The one thing that depends on the number of processes: a slice of the batch has dropout of its own"
    (a, _), _ = two
    one = follow('dropout', tmp_path)
    assert a['dropout']['loss'] != pytest.approx(one['loss'], abs=1e-3)
    assert a['dropout']['loss'] == pytest.approx(one['loss'], rel=.05)
