"""dit: the paper's rows by their numbers, the wrapper by what it must not change, positions, labels and adaLN-Zero"""
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import nn

from facegen.core import generator, seed_all
from facegen.data.faces import Face
from facegen.diffusion.losses import diffusion_loss
from facegen.diffusion.samplers import make_sampler, sample
from facegen.diffusion.schedules import make_scheduler
from facegen.models.dit import DITS, DiT, check_patches, dit_summary, make_dit
from facegen.synthetic.toyfaces import render_faces
from facegen.training.config import TrainConfig
from facegen.training.loop import train


def small(**changes):
    return DiT(**{**dict(size=16, patch=4, layers=2, heads=2, head_dim=8, zero_init=False), **changes}).eval()


def two(side=16):
    return torch.randn(2, 3, side, side, generator=generator('dit')), torch.tensor([5, 600])


# the rows, counted on the meta device

@pytest.mark.parametrize('row, params, gflops, share', [
    ('small', 34_373_168, 51.7, 1001*512*6), ('large', 147_476_784, 212.9, 1001*768*12)])
def test_the_papers_networks(row, params, gflops, share):
    "Weights to the last one; GFLOPs of one face forward, a multiply and an add counted as two"
    w = dit_summary(row, 128)
    assert w['params'] == params and w['tokens'] == 1024
    assert w['gflops'] == pytest.approx(gflops, abs=.05)
    assert w['unused'] == share - DITS[row]['layers']*DITS[row]['heads']*DITS[row]['head_dim']  # all labels but row 0


@pytest.mark.parametrize('row, macs, millions', [('S/2', 6.06, 33), ('B/2', 23.01, 130), ('L/2', 80.71, 458)])
def test_the_standard_networks(row, macs, millions):
    "Peebles and Xie 2023 count a multiply and an add as one, on 32x32x4 latents; diffusers: a timestep network a block"
    w, c = dit_summary(row, 32, channels=4), DITS[row]
    assert w['gflops']/2 == pytest.approx(macs, rel=.002)
    D = c['heads']*c['head_dim']
    more = (c['layers'] - 1)*(256*D + D + D*D + D)
    assert (w['params'] - more)/1e6 == pytest.approx(millions, abs=1.5)


@pytest.mark.parametrize('pair, size', [('laptop', 32), ('gpu', 64)])
def test_our_pairs_keep_the_papers_ratio(pair, size):
    s, l = dit_summary(f'{pair}_s', size), dit_summary(f'{pair}_l', size)
    assert l['params']/s['params'] == pytest.approx(147_476_784/34_373_168, rel=.04)
    assert l['gflops']/s['gflops'] == pytest.approx(212.9/51.7, rel=.06)
    assert s['tokens'] == l['tokens'] == {'laptop': 64, 'gpu': 256}[pair]
    same = lambda row: {k: v for k, v in DITS[row].items() if k not in ('layers', 'heads')}
    assert same(f'{pair}_s') == same(f'{pair}_l')  # they differ in size alone


@pytest.mark.parametrize('ours, theirs', [('laptop_s', 'small'), ('laptop_l', 'large')])
def test_laptop_rows_are_miniatures_of_the_papers(ours, theirs):
    "A third of the layers, half the heads, half their width, the same patch; no label table, no dropout, adaLN-Zero"
    a, b = DITS[ours], DITS[theirs]
    times = dict(layers=3, heads=2, head_dim=2, patch=1)
    assert all(times[k]*a[k] == b[k] for k in times)
    assert set(b) - set(a) == {'dropout', 'labels', 'zero_init'}


def test_small_rows():
    assert [round(dit_summary(f'laptop_{x}', 32)['params']/1e6, 2) for x in 'sl'] == [.74, 3.11]
    assert [round(dit_summary(f'laptop_{x}', 32)['gflops'], 4) for x in 'sl'] == [.0569, .2442]
    assert dit_summary('smoke', 32)['params'] < 1e5 and dit_summary('smoke', 32)['gflops'] < .02


@pytest.mark.parametrize('patch', [2, 4, 8])
def test_operations_by_hand(patch):
    "12 D^2 products a token and block, 2 N D of attention, and what is done once"
    w = dit_summary('small', 64, patch=patch)
    N, D, L = (64//patch)**2, 512, 6
    assert w['attention']*1e9 == pytest.approx(2*L*N*2*N*D)
    once = (L + 1)*(256*D + D*D) + L*6*D*D + 2*D*D  # time networks, adaLN, last adaLN
    assert w['gflops']*1e9 == pytest.approx(2*(L*N*(12*D*D + 2*N*D) + 2*N*3*patch**2*D + once), rel=1e-6)


# the wrapper

def test_the_wrapper_is_the_library():
    seed_all(0)
    net = small(labels=1000)
    seed_all(0)
    twin = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2,
                                 sample_size=16, patch_size=4).eval()
    x, t = two()
    assert torch.equal(net(x, t), twin(x, t, torch.zeros(2, dtype=torch.int64)).sample)


def test_the_library_is_the_paper():
    "A block written down from Peebles and Xie 2023 (adaLN-Zero), and the last layer"
    seed_all(0)
    net = small(layers=1)
    x, t = two()
    d = net.net
    b = d.transformer_blocks[0]
    c = F.silu(b.norm1.emb(t, torch.zeros_like(t), hidden_dtype=torch.float32))
    s1, c1, g1, s2, c2, g2 = b.norm1.linear(c)[:, None].chunk(6, -1)
    norm = lambda h, eps=1e-6: F.layer_norm(h, h.shape[-1:], eps=eps)
    heads = lambda h: h.unflatten(-1, (2, 8)).transpose(1, 2)
    def attend(h):
        q, k, v = (heads(f(h)) for f in (b.attn1.to_q, b.attn1.to_k, b.attn1.to_v))
        return b.attn1.to_out[0](((q @ k.mT/math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(2))
    h = F.conv2d(x, d.pos_embed.proj.weight, d.pos_embed.proj.bias, stride=4).flatten(2).mT + d.pos_embed.pos_embed
    h = h + g1*attend(norm(h)*(1 + c1) + s1)
    h = h + g2*b.ff.net[2](F.gelu(b.ff.net[0].proj(norm(h, 1e-5)*(1 + c2) + s2), approximate='tanh'))
    shift, scale = d.proj_out_1(c)[:, None].chunk(2, -1)
    h = d.proj_out_2(norm(h)*(1 + scale) + shift)                                             # (2,16,48)
    out = h.view(2, 4, 4, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 16, 16)
    torch.testing.assert_close(net(x, t), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('patch', [1, 2, 4])
def test_cutting_into_patches_can_be_undone(patch):
    "With closed gates and identities before and after, the network returns what it sees"
    n = 3*patch**2
    net = DiT(size=8, patch=patch, layers=1, heads=1, head_dim=4*n).eval()
    d = net.net
    with torch.no_grad():
        d.pos_embed.pos_embed.zero_()
        d.pos_embed.proj.weight.zero_()
        d.pos_embed.proj.bias.zero_()
        d.norm_out = nn.Identity()
        i = 0
        for row in range(patch):
            for col in range(patch):
                for channel in range(3):
                    d.pos_embed.proj.weight[i, channel, row, col] = 1
                    d.proj_out_2.weight[i, i] = 1
                    i += 1
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x, torch.tensor([1, 900])), x)


@pytest.mark.parametrize('row', ['smoke', 'laptop_s'])
def test_save_and_load(row, tmp_path):
    net = make_dit(row, 32, zero_init=False, dropout=.1, label_dropout=.1).eval()
    net.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'diffusion_pytorch_model.safetensors']
    plain = lambda m: {k: v for k, v in m.config.items() if k[0] != '_'}
    assert plain(again) == plain(net) and not again.training
    a, b = net.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(net.net.pos_embed.pos_embed, again.net.pos_embed.pos_embed)  # not in the file: made anew
    assert again.net.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob == .1
    x, t = two(32)
    with torch.no_grad():
        assert torch.equal(net(x, t), again(x, t))


def test_items_of_a_batch_do_not_mix():
    net, (x, t) = small(), two()
    for i in range(2):
        torch.testing.assert_close(net(x, t)[i:i+1], net(x[i:i+1], t[i:i+1]), rtol=1e-4, atol=1e-5)


def test_time_matters():
    net, (x, _) = small(), two()
    x = x[:1]
    assert not torch.allclose(net(x, torch.tensor([0])), net(x, torch.tensor([500])))


def test_same_seed_same_network():
    def weights():
        seed_all(3)
        return make_dit('smoke', 32).state_dict()
    a, b = weights(), weights()
    assert all(torch.equal(a[k], b[k]) for k in a)


# positions

@pytest.mark.parametrize('dims, shift', [(-1, 4), (-2, 8), ((-2, -1), (4, -4))])
def test_only_positions_know_where_a_patch_is(dims, shift):
    net, (x, t) = small(), two()
    roll = lambda x: x.roll(shift, dims)
    assert (net(roll(x), t) - roll(net(x, t))).abs().max() > .05
    net.net.pos_embed.pos_embed.zero_()
    torch.testing.assert_close(net(roll(x), t), roll(net(x, t)), rtol=1e-4, atol=1e-5)
    half = lambda x: x.roll(2, -1)  # not by whole patches: other tokens, another answer
    assert (net(half(x), t) - half(net(x, t))).abs().max() > .05


def test_one_block_sees_everything():
    net, (x, t) = small(layers=1), two()
    x.requires_grad_()
    net(x, t)[:, :, :4, :4].square().sum().backward()
    assert (x.grad.abs().amax((0, 1)) > 0).all()


# labels

def tables(net): return [b.norm1.emb.class_embedder.embedding_table.weight for b in net.net.transformer_blocks]


def test_label_dropout_does_not_act_unless_asked_for():
    x, t = two()
    x, t = x[:1].expand(64, -1, -1, -1), t[:1].expand(64)  # one question, 64 times
    def kinds(rate):
        seed_all(0)
        return len(small(labels=10, layers=3, label_dropout=rate).train()(x, t).detach().mul(1e3).round().unique(dim=0))
    assert kinds(0.) == 1 and kinds(.1) > 5
    net = small(label_dropout=.1)
    assert torch.equal(net(x, t), net(x, t))  # never in eval


def test_how_often_the_published_network_drops():
    "Each block draws for itself, the last layer once more: with 6 blocks 1 - .9^7 = 52 % of items meet the empty row"
    seed_all(0)
    net = small(layers=6, label_dropout=.1).train()
    x, t = two()
    n = 1000
    with torch.no_grad():
        out = net(x[:1].expand(n, -1, -1, -1), t[:1].expand(n))
        want = net.eval()(x[:1], t[:1])
    assert ((out - want).abs().amax((1, 2, 3)) > 1e-4).float().mean() == pytest.approx(1 - .9**7, abs=.05)


def test_a_fixed_label_is_a_second_bias():
    net, (x, t) = small(), two()
    before = net(x, t)
    with torch.no_grad():
        for b in net.net.transformer_blocks:
            e = b.norm1.emb
            e.timestep_embedder.linear_2.bias += e.class_embedder.embedding_table.weight[0]
            e.class_embedder.embedding_table.weight.zero_()
    torch.testing.assert_close(net(x, t), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('rate, used', [(0., [0]), (.5, [0, 7])])
def test_a_gradient_reaches_every_weight_that_is_read(rate, used):
    "Of the label tables row 0 alone, and the last row where labels are dropped; of all else every tensor"
    seed_all(0)
    net = small(labels=7, label_dropout=rate).train()
    x = torch.randn(64, 3, 16, 16)
    net(x, torch.arange(64)*15).sub(x).square().mean().backward()
    assert not [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    for table in tables(net):
        assert table.grad.abs().sum(1).nonzero().flatten().tolist() == used


# adaLN-Zero and dropout

def test_a_fresh_network_with_closed_gates_answers_zero():
    x, t = two(32)
    assert all(not DITS[row]['zero_init'] for row in ('small', 'large')) and make_dit('laptop_s', 32).config.zero_init
    assert (make_dit('smoke', 32)(x, t) == 0).all() and (make_dit('smoke', 32, zero_init=False)(x, t).abs() > 0).all()


def test_closed_gates_open_in_three_steps():
    "First the last layer, then the gates and its adaLN, then everything"
    seed_all(0)
    net = small(zero_init=True)
    x, t = two()
    opt = torch.optim.SGD(net.parameters(), .5)
    reached = []
    for _ in range(3):
        opt.zero_grad()
        (net(x, t) - x).square().mean().backward()
        reached.append({k for k, p in net.named_parameters() if p.grad.abs().sum() > 0})
        opt.step()
    first, second, third = reached
    assert first == {'net.proj_out_2.weight', 'net.proj_out_2.bias'}
    assert {f'net.transformer_blocks.{i}.norm1.linear.weight' for i in (0, 1)} | {'net.proj_out_1.weight'} <= second
    assert not [k for k in second if 'attn1' in k or '.ff.' in k or '.emb.' in k]
    assert third == {k for k, _ in net.named_parameters()}


def test_dropout_only_in_training():
    net, (x, t) = small(dropout=.5), two()
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def test_samples_are_drawn_without_dropout():
    "A network in the middle of its training gives the pictures that it gives in eval, and goes on training"
    seed_all(0)
    net = small(dropout=.5, label_dropout=.5)
    sampler = make_sampler('ddim', make_scheduler())
    pictures = lambda: sample(net, sampler, 2, 16, steps=2)
    calm = pictures()
    net.train()
    assert torch.equal(pictures(), calm) and all(m.training for m in net.modules())


# training

class Few:
    "Eight drawn faces"
    def __init__(self):
        self.face = render_faces(n=8, size=32, seed=3)
    def __len__(self): return 8
    def __getitem__(self, rows): return Face(*(x[rows] for x in self.face))


def test_it_trains_through_the_loop(recwarn):
    def run():
        seed_all(0)
        net = make_dit('smoke', 32)
        cfg = TrainConfig(steps=60, batch=8, lr=3e-3, warmup=5, ema=.9, seed=0, device='cpu')
        return net, [s.loss for s in train(net, Few(), diffusion_loss(make_scheduler()), cfg)]
    (net, a), (_, b) = run(), run()
    assert a == b and not net.training
    assert a[0] == pytest.approx(1, abs=.05)  # a zero answer misses noise of variance 1
    assert sum(a[-10:]) < .75*sum(a[:10])
    assert not [w for w in recwarn if 'no gradient' in str(w.message)]


# wrong calls

def test_wrong_calls():
    with pytest.raises(ValueError, match=r'size 90 must be divisible by 4 \(the side of a patch\): take 88 or 92'):
        make_dit('small', 90)
    with pytest.raises(ValueError, match='take 4$'):
        check_patches(2, 4)
    with pytest.raises(ValueError, match='must be one of small, large'):
        make_dit('medium', 128)
    net, (x, t) = small(), two()
    for wrong in (x[..., :12], torch.randn(2, 3, 8, 32), torch.randn(2, 3, 32, 32), torch.randn(2, 4, 16, 16)):
        with pytest.raises(ValueError, match=r'made for pictures \(3, 16, 16\) and got'):
            net(wrong, t)
    with pytest.raises(ValueError, match='unconditional'):
        net(x, t, cond=torch.ones(1))
    with pytest.raises(TypeError, match='width'):
        make_dit('smoke', 32, width=3)


def test_latents():
    net = make_dit('smoke', 16, channels=4, patch=2)
    assert net(torch.randn(1, 4, 16, 16), torch.tensor([1])).shape == (1, 4, 16, 16)
