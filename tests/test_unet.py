"""unet: the paper's rows by their numbers, the wrapper by what it must not change"""
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from facegen.core import generator, seed_all
from facegen.diffusion.schedules import make_scheduler
from facegen.models.unet import UNETS, UNet, check_size, make_unet, unet_summary

PAPER = dict(  # weights and GFLOPs a face at 128 px, from the paper's own code
    baseline=(113_673_219, 124.1), r1=(106_380_035, 293.4), r2=(25_636_483, 113.9), r3=(288_906_627, 272.1),
    r4=(93_343_107, 345.7), r5=(118_793_987, 124.1), r6=(166_489_763, 573.8))
SIDES = dict(baseline=[8], r1=[32, 16], r2=[64, 16], r3=[32, 8], r4=[64, 32, 16], r5=[8], r6=[64, 32])


@pytest.mark.parametrize('row', PAPER)
def test_the_papers_networks(row):
    w = unet_summary(row, 128)
    assert w['params'] == PAPER[row][0]
    assert w['gflops'] == pytest.approx(PAPER[row][1], abs=.06)
    assert w['attention'][0] == SIDES[row]


@pytest.mark.parametrize('row', PAPER)
def test_the_papers_networks_an_eighth_as_wide(row):
    """Nothing but widths, heads and groups differ; a 64th of the weights; attention at the same levels. All weights
    learn at 32 px, but for queries and keys of a middle block that sees one place only"""
    summary = unet_summary(f'{row}/8', 32)
    same = lambda row: {k: v for k, v in UNETS[row].items() if k not in ('widths', 'groups', 'head_dim')}
    assert same(f'{row}/8') == same(row) and [8*n for n in UNETS[f'{row}/8']['widths']] == list(UNETS[row]['widths'])
    assert summary['params'] == pytest.approx(PAPER[row][0]/64, rel=.03)
    assert summary['attention'] == tuple([side//4 for side in sides] for sides in unet_summary(row, 128)['attention'])
    net, x = make_unet(f'{row}/8', 32), torch.randn(2, 3, 32, 32)
    F.mse_loss(net(x, torch.tensor([5, 900])), x).backward()
    def learns(k, p):  # rounding makes 1e-12 of a zero on some CPUs; a key's bias is always a rounded zero
        return p.grad is not None and p.grad.abs().max() > (0 if k.endswith('to_k.bias') else 1e-10)
    unused = [k.removeprefix('net.mid_block.attentions.0.') for k, p in net.named_parameters() if not learns(k, p)]
    assert {k.split('.')[0] for k in unused} == ({'to_q', 'to_k'} if len(UNETS[row]['widths']) == 6 else set())


def test_the_narrow_rows_keep_the_order_of_the_papers():
    "Which of two networks is larger, and which is more expensive"
    narrow = {row: unet_summary(f'{row}/8', 32) for row in PAPER}
    assert sorted(PAPER, key=lambda r: narrow[r]['params']) == sorted(PAPER, key=lambda r: PAPER[r][0])
    assert sorted(PAPER, key=lambda r: round(narrow[r]['gflops'], 3)) == sorted(PAPER, key=lambda r: PAPER[r][1])
    head_dims = {row: UNETS[f'{row}/8']['head_dim'] for row in PAPER}
    assert head_dims == dict.fromkeys(PAPER, 8) | dict(r6=20)  # fewer and wider heads, as in the paper


def test_small_rows():
    laptop, smoke = unet_summary('laptop', 32), unet_summary('smoke', 32)
    assert 1.5e6 < laptop['params'] < 3e6 and laptop['attention'][0] == [8]
    assert 5e4 < smoke['params'] < 1e5 and smoke['gflops'] < .05


def small(**kw): return UNet(**{**dict(size=16, widths=(8, 16), down='DA', groups=8, space_to_depth=2), **kw}).eval()


def test_without_space_to_depth_it_is_the_library():
    "With space_to_depth=1 the wrapper is diffusers' UNet2DModel and nothing else"
    seed_all(0)
    net = small(space_to_depth=1, adagn=True, layers=2)
    seed_all(0)
    twin = UNet2DModel(
        sample_size=16, down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D'), block_out_channels=(8, 16), layers_per_block=2,
        norm_num_groups=8, resnet_time_scale_shift='scale_shift').eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 999])
    assert torch.equal(net(x, t), twin(x, t).sample)


def test_space_to_depth_can_be_undone():
    net = small()
    net.net.forward = lambda h, t: type('Out', (), dict(sample=h))()  # a network that returns what it sees
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(net(x, torch.tensor([1, 2])), x)


def test_items_of_a_batch_do_not_mix():
    seed_all(0)
    net = small()
    x, t = torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 500, 999])
    for i in range(4):
        torch.testing.assert_close(net(x, t)[i:i+1], net(x[i:i+1], t[i:i+1]), rtol=1e-4, atol=1e-5)


def test_time_matters():
    seed_all(0)
    net = small()
    x = torch.randn(1, 3, 16, 16)
    assert not torch.allclose(net(x, torch.tensor([0])), net(x, torch.tensor([500])))


@pytest.mark.parametrize('row', ['smoke', 'laptop'])
def test_save_and_load(row, tmp_path):
    net = make_unet(row, 32, dropout=.1).eval()
    net.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'diffusion_pytorch_model.safetensors']
    plain = lambda m: {k: list(v) if isinstance(v, tuple) else v for k, v in m.config.items() if k[0] != '_'}
    assert plain(again) == plain(net) and not again.training
    a, b = net.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([5, 600])
    with torch.no_grad():
        assert torch.equal(net(x, t), again(x, t))


def test_dropout_only_in_training():
    net = small(dropout=.5)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def test_every_weight_gets_a_gradient():
    net = make_unet('laptop', 32)
    x = torch.randn(2, 3, 32, 32)
    F.mse_loss(net(x, torch.tensor([5, 900])), x).backward()
    assert not [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_same_seed_same_network():
    def weights():
        seed_all(3)
        return make_unet('smoke', 32).state_dict()
    a, b = weights(), weights()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_latents_and_other_sizes():
    net = make_unet('smoke', 32, channels=4)
    assert net(torch.randn(1, 4, 32, 32), torch.tensor([1])).shape == (1, 4, 32, 32)
    assert net(torch.randn(1, 4, 64, 48), torch.tensor([1])).shape == (1, 4, 64, 48)  # the side does not matter


def test_it_learns():
    seed_all(0)
    net, s, g = make_unet('smoke', 32), make_scheduler(), generator('learn')
    x0 = torch.rand(8, 3, 1, 1, generator=g).expand(8, 3, 32, 32)*2 - 1
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(100):
        eps, t = torch.randn(8, 3, 32, 32, generator=g), torch.randint(0, 1000, (8,), generator=g)
        loss = F.mse_loss(net(s.add_noise(x0, eps, t), t), eps)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < .3


def test_wrong_calls():
    with pytest.raises(ValueError, match=r'divisible by 32 \(space_to_depth 1, 5 halvings\): take 64 or 96'):
        make_unet('baseline', 90)
    with pytest.raises(ValueError, match='take 8'):
        check_size(4, space_to_depth=2, levels=3)
    with pytest.raises(ValueError, match='must be one of baseline, r1'):
        make_unet('r7', 128)
    with pytest.raises(ValueError, match='image size 30'):
        small()(torch.randn(1, 3, 16, 30), torch.tensor([1]))
    with pytest.raises(ValueError, match='unconditional'):
        small()(torch.randn(1, 3, 16, 16), torch.tensor([1]), cond=torch.ones(1))
    with pytest.raises(TypeError, match='width'):
        make_unet('smoke', 32, width=3)
