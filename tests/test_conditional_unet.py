"""Conditions, condition encoders, denoisers, which parameters move in training, and what may be cut or stopped."""
from functools import partial

import pytest
import torch
from torch import nn
from transformers import SegformerConfig

from facegen.conditioning.conditional_unet import (
    CORRUPTIONS, DENOISERS, conditional_loss, contrastive_term, load_denoiser, make_denoiser)
from facegen.core import PARTS, seed_all
from facegen.data.faces import Face, flip_faces
from facegen.conditioning.infonce import NCE
from facegen.conditioning.mask_encoders import ParsingSegFormer
from facegen.diffusion.losses import StepRandom, diffusion_loss, weighting
from facegen.diffusion.schedules import make_scheduler
from facegen.training.config import InMemoryFaces, TrainConfig
from facegen.diffusion.samplers import make_sampler, sample
from facegen.conditioning.condition_encoders import CONDITIONINGS, Cond, ConditionEncoder
from facegen.synthetic.toyfaces import render_faces
from facegen.training.loop import setup, train

torch.set_num_threads(1)
NOISE = make_scheduler()
ONE_TOKEN = ('uncond', 'attrs', 'published', 'described', 'mask-only')  # a single token, repeated
NO_GRADIENT = ('attn2.to_q', 'attn2.to_k', 'transformer_blocks.0.norm2.') # what only weights equal tokens


@pytest.fixture(scope='module')
def face(): return render_faces(n=8, size=32, seed=3)


@pytest.fixture(scope='module')
def cond(face): return Cond(face.attrs, face.mask)


def net(conditioning, **changes):
    seed_all(0)
    return make_denoiser('smoke', conditioning, 32, **changes)
def config(**keys):
    small = dict(steps=3, batch=8, lr=1e-3, warmup=0, weight_decay=0., ema=0., flip=False, device='cpu')
    return TrainConfig(**small | keys)


def noisy(n=8): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(5)), torch.full((n,), 500)
def no_gradient(name, conditioning): return conditioning in ONE_TOKEN and any(w in name for w in NO_GRADIENT)


class Recorder(nn.Module):
    "Writes down what a denoiser would have got, and answers with zeros"
    def __init__(self):
        super().__init__()
        self.calls, self.p = [], nn.Parameter(torch.zeros(1))
    def forward(self, x, t, cond=None):
        self.calls.append((x, t, cond))
        return 0*x + self.p


# Conditions

def test_a_condition_slices_and_drops_like_its_rows(cond):
    assert len(cond) == 8 and len(cond[2:5]) == 3 and torch.equal(cond[torch.tensor([1, 3])].mask, cond.mask[[1, 3]])
    which = torch.arange(8) % 3 == 0
    for a in (True, False, which):
        for m in (True, False, which):
            d = cond.drop(a, m)
            a_, m_ = (torch.as_tensor(w).expand(8) for w in (a, m))
            assert d.attrs[a_].isnan().all() and torch.equal(d.attrs[~a_], cond.attrs[~a_])
            assert (d.mask[m_] == -1).all() and torch.equal(d.mask[~m_], cond.mask[~m_])
    assert not cond.attrs.isnan().any() and cond.mask.min() >= 0, 'dropping makes a new condition'


def test_corruptions_are_wrong_on_purpose(cond):
    assert CORRUPTIONS['true'](cond) is cond and (CORRUPTIONS['blank masks'](cond).mask == 0).all()
    for name, same, other in (('shuffled masks', 'attrs', 'mask'), ('shuffled attrs', 'mask', 'attrs')):
        c = CORRUPTIONS[name](cond)
        was, now = getattr(cond, other), getattr(c, other)
        assert torch.equal(getattr(c, same), getattr(cond, same))
        assert sorted(map(hash, map(str, was.tolist()))) == sorted(map(hash, map(str, now.tolist()))), 'the same rows'
        assert all(not torch.equal(a, b) for a, b in zip(was, now)), 'and none in its own place'


# Condition encoders

def make_encoder(name, **keys):
    seed_all(0)
    sizes = dict(frozen_projection=False, dim=32, token_repeats=4, size=32, grid=16, width=8, segformer='')
    return ConditionEncoder(**{**sizes, **CONDITIONINGS[name], **keys}).eval()


@pytest.mark.parametrize('name', CONDITIONINGS)
def test_what_a_condition_encoder_reads(name, cond):
    t = make_encoder(name)
    tokens, grid = t(cond)
    many = {'attr-tokens': 40, 'presence': 41, 'areas': 41, 'pooled': 41, 'mask-tokens': 56, 'spatial': 40}
    assert tokens.shape == (8, many.get(name, 4), 32)
    assert (grid is None) == (name not in ('spatial', 'mask-only')) and (grid is None or grid.shape == (8, 8, 16, 16))
    far = lambda c: max((a - b).abs().max().item() for a, b in zip(t(c), (tokens, grid)) if b is not None)
    assert (far(cond.drop(True, False)) > 1e-4) == (name not in ('uncond', 'mask-only')), 'attributes'
    assert (far(cond.drop(False, True)) > 1e-4) == (name not in ('uncond', 'attrs', 'attr-tokens')), 'masks'
    if name in ONE_TOKEN:
        assert torch.equal(tokens, tokens[:, :1].expand_as(tokens))
    part = t(cond[2:5])[0]
    assert torch.allclose(part, tokens[2:5], atol=1e-5), 'a row does not depend on the others'


@pytest.mark.parametrize('changes,words', [
    (dict(mask='boxes'), "not as 'tokens' and 'boxes'"), (dict(attrs='clip'), "not as 'clip'"),
    (dict(frozen_projection=True), "'tokens' and 'grid' have none")])
def test_a_condition_encoder_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        net('spatial', **changes)


def test_the_pooled_mask_cannot_say_where_but_for_its_encoders_asymmetry(cond):
    "With kernels that equal their mirror image, and no even strides, a mask and its mirror image give the same tokens"
    pooled, spatial, twin = make_encoder('published'), make_encoder('spatial'), Cond(cond.attrs, cond.mask.flip(2))
    far = lambda a, b: ((a - b).norm()/a.norm()).item()
    with torch.no_grad():
        asymmetry = far(pooled(cond)[0], pooled(twin)[0])
        assert 1e-3 < asymmetry < .3*far(spatial(cond)[1], spatial(twin)[1])
        pool = pooled.mask
        config = {**pool.encoder.config.to_dict(), 'sr_ratios': [1]*4}
        pool.encoder = type(pool.encoder)(SegformerConfig(**config)).eval()
        pool.side = 65
        for m in pool.encoder.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.copy_((m.weight + m.weight.flip(3))/2)
        assert far(pooled(cond)[0], pooled(twin)[0]) < 1e-4
        other = Cond(cond.attrs, cond.mask.roll(1, 0))
        assert far(pooled(cond)[0], pooled(other)[0]) > 1e-3, 'it does encode what is there'


# Denoisers

@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_dropping_everything_is_the_unconditional_branch(conditioning, cond):
    model = net(conditioning).eval()
    x, t = noisy()
    with torch.no_grad():
        nothing = model(x, t)
        assert torch.equal(model(x, t, cond.drop()), nothing)
        assert torch.equal(model(x, t, Cond.unconditional(8, 32)), nothing)
        assert (conditioning == 'uncond') == torch.allclose(model(x, t, cond), nothing, atol=1e-6)
        assert torch.allclose(model(x[:3], t[:3], cond[:3]), model(x, t, cond)[:3], atol=1e-5)


@pytest.mark.parametrize('row', DENOISERS)
def test_every_row_can_be_built_at_its_size_and_small_ones_answer_in_their_shape(row):
    size, small = 256 if row.startswith('lc') else 64, row.startswith(('smoke', 'laptop'))
    with torch.device('cpu' if small else 'meta'):
        model = make_denoiser(row, 'spatial', size)
    c = model.config
    x = torch.randn(2, c.channels, size//c.downsampling, size//c.downsampling)
    if small:
        assert model.eval()(x, torch.zeros(2).long()).shape == x.shape
    else:
        assert model.net.config.in_channels == c.channels*c.space_to_depth**2 + c.width
        assert model.net.config.sample_size == size//c.downsampling//c.space_to_depth


def test_the_papers_networks_have_their_parameters():
    with torch.device('meta'):
        for row, n in (('lc_unet_2', 109_543_043), ('lc_unet_3_vqvae', 104_950_915), ('lc_unet_nb_vqvae', 140_457_987)):
            model = make_denoiser(row, 'attrs', 256)
            assert sum(p.numel() for p in model.net.parameters()) == n
            assert sum(p.numel() for p in model.condition_encoder.parameters()) == 73_848
        join = make_denoiser('lc_unet_2', 'described', 256).condition_encoder
        assert join.join.weight.shape == (256, 384) and join.mask.proj.weight.shape == (128, 256)


@pytest.mark.parametrize('row,size', [('lc_unet_nb_vqvae', 256), ('gpu_nb_latent', 64), ('laptop_nb_latent', 64),
                                      ('smoke_nb_latent', 64)])
def test_the_network_of_the_shipped_checkpoint_attends_at_4x4_and_in_the_middle_alone(row, size):
    with torch.device('meta'):
        config = make_denoiser(row, 'attrs', size).net.config
    levels = len(config.block_out_channels)
    sides = [config.sample_size//2**i for i in range(levels)]
    attending = [s for s, kind in zip(sides, config.down_block_types) if 'CrossAttn' in kind]
    assert attending == [4] and sides[-1] == 2 and config.mid_block_type == 'UNetMidBlock2DCrossAttn'


def test_a_fine_tuned_segformer_stays_as_it_came(face, tmp_path):
    "It is frozen in the denoiser as any other, while the projection behind it learns"
    seed_all(7)
    segformer = ParsingSegFormer(64)
    segformer.save_encoder(tmp_path)
    model = net('described', segformer=str(tmp_path))
    before = model.condition_encoder.mask.proj.weight.clone()
    list(train(model, InMemoryFaces(face), conditional_loss(NOISE, nce='published'), config()))
    mine, came = (dict(m.named_parameters()) for m in (model.condition_encoder.mask.encoder, segformer.net.segformer))
    assert mine.keys() == came.keys() and all(torch.equal(p, came[k]) for k, p in mine.items())
    assert not torch.equal(model.condition_encoder.mask.proj.weight, before)


def test_what_does_not_fit_gets_a_sentence(cond):
    model = net('spatial')
    x, t = noisy()
    for call, words in (
            (lambda: model(x[..., :16, :16], t, cond), r'works on \(B,3,32,32\), got \(8, 3, 16, 16\)'),
            (lambda: model(x[:2], t[:2], cond), r'attributes must be \(2,40\), one row a face, got \(8, 40\)'),
            (lambda: model(x, t, Cond(cond.attrs, cond.mask[:, ::2, ::2])),
             r'masks must be \(8,32,32\).*resize them with nearest'),
            (lambda: make_denoiser('smoke', 'spatal', 32), "unknown conditioning 'spatal'"),
            (lambda: make_denoiser('smoek', 'spatial', 32), "unknown denoiser 'smoek'"),
            (lambda: net('spatial')(x, t, Cond(cond.attrs, cond.mask + 18)), 'masks hold whole classes'),
            (lambda: make_denoiser('smoke', 'spatial', 34), 'image size 34 must be divisible by 4')):
        with pytest.raises(ValueError, match=words):
            call()


# Which parameters move

@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_every_trainable_parameter_is_in_one_group_gets_a_gradient_and_moves(conditioning, face):
    "With every contrastive loss. Excepted by name: what weights several equal tokens gets nothing, up to rounding"
    for nce in ('', *NCE):
        model, largest, cfg = net(conditioning, image_encoder=nce == 'image'), {}, config()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        groups = [p for g in setup(model, cfg).opt.param_groups for p in g['params']]
        assert sorted(map(id, groups)) == sorted(map(id, named.values())), 'each once, and no frozen one'
        for n, p in named.items():
            p.register_hook(lambda g, n=n: largest.__setitem__(n, max(largest.get(n, 0.), g.abs().max().item())))
        list(train(model, InMemoryFaces(face), conditional_loss(NOISE, nce=nce, cond_dropout=(.3, .3)), cfg))
        expected = {n for n in named if not no_gradient(n, conditioning)}
        assert {n for n in expected if not largest.get(n, 0.) > 1e-9} == set()
        assert {n for n in named if no_gradient(n, conditioning) and not largest.get(n, 0.) < 1e-9} == set()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
        assert expected <= moved <= set(named)


def test_published_leaves_its_two_projections_still_and_described_does_not():
    def still(conditioning):
        named = net(conditioning).condition_encoder.named_parameters()
        return {n for n, p in named if not p.requires_grad and 'encoder' not in n}
    assert still('published') == {'mask.proj.weight', 'mask.proj.bias', 'join.weight', 'join.bias'}
    assert still('described') == set()
    with torch.no_grad():
        a, b = net('published').eval(), net('described').eval()
        x, t = noisy(2)
        assert torch.equal(a(x, t), b(x, t)), 'nothing else tells the two apart'


def test_equal_tokens_give_query_and_key_no_gradient(face):
    "In the denoiser itself, next to one token an attribute"
    size = {}
    for conditioning in ('attrs', 'spatial'):
        model = net(conditioning)
        conditional_loss(NOISE)(model, face, StepRandom(0, 0, 8)).mean().backward()
        for part in ('to_q', 'to_k', 'to_v'):
            weights = [p for n, p in model.net.named_parameters() if f'attn2.{part}.weight' in n]
            size[conditioning, part] = max(p.grad.abs().max().item() for p in weights)
    for part in ('to_q', 'to_k'):
        assert size['attrs', part] < 1e-6*size['attrs', 'to_v'] and size['spatial', part] > 1e-4*size['spatial', 'to_v']


def test_the_unknown_state_is_learned_only_where_something_is_unknown(face):
    for dropout in (0., .5):
        model = net('spatial')
        was = model.condition_encoder.attrs.unknown.detach().clone()
        list(train(model, InMemoryFaces(face), conditional_loss(NOISE, cond_dropout=(dropout, 0.)), config()))
        assert torch.equal(model.condition_encoder.attrs.unknown, was) == (not dropout)


# Does the mask arrive in its place?

def test_mirroring_the_mask_mirrors_the_generated_face():
    "Some seconds of training; generated faces are compared with those behind the masks, and those mirrored"
    crowd = render_faces(n=160, size=32, seed=0)
    some = lambda rows: Face(*(x[rows] for x in crowd))
    noise, test = make_scheduler(prediction='sample'), some(slice(128, None))
    twin = flip_faces(test)
    model = net('spatial', widths=(32, 32), groups=16)
    cfg = config(steps=48, batch=16, lr=4e-3, warmup=6, flip=True)
    list(train(model, InMemoryFaces(some(slice(128))), conditional_loss(noise, cond_dropout=(.1, .1)), cfg))
    generate = lambda mask: sample(model, make_sampler('dpm++', noise), 32, 32, 5, Cond(test.attrs, mask), seed=0)
    nearer = lambda x, a, b: ((x - a).square().mean((1, 2, 3)) < (x - b).square().mean((1, 2, 3))).float().mean().item()
    assert nearer(generate(test.mask), test.image, twin.image) > .75   # by chance 0.5; 24 of 32 by chance: 0.4 %
    assert nearer(generate(twin.mask), twin.image, test.image) > .75


def test_the_kept_network_draws_paint_where_it_was_painted():
    "The pose is that of the mask, a hat appears above, a strand of hair on its own side"
    denoiser, to_faces = load_denoiser('longer-laptop-s0')
    assert not denoiser.training and denoiser.dtype == torch.float32
    crowd, sampler = render_faces(n=4, size=64, seed=3), make_sampler('dpm++', make_scheduler(prediction='flow'))
    def generate(mask):
        return to_faces(sample(denoiser, sampler, 4, 16, 10, Cond(crowd.attrs, mask), seed=1, channels=4))
    def painted(part, rows, columns):
        mask = crowd.mask.clone()
        mask[:, rows, columns] = PARTS.index(part)
        return (generate(mask) - plain).abs().mean(1)  # (4,64,64)
    plain = generate(crowd.mask)
    assert plain.shape == (4, 3, 64, 64) and plain.abs().max() <= 1
    left, right = (painted('hair', slice(28, 40), slice(c, c + 12)) for c in (13, 39))
    assert left[..., :32].sum() > 1.5*left[..., 32:].sum() and right[..., 32:].sum() > 1.5*right[..., :32].sum()
    hat = painted('hat', slice(4, 18), slice(8, 56))
    assert hat[:, 4:18].mean() > 3*hat[:, 32:].mean()


# The loss

def test_dropping_is_independent_and_as_often_as_asked(face):
    "Four cells of a table, and all of the chance still that of the row without dropping"
    model, plain, one, n = Recorder(), Recorder(), Face(*(x[:1].expand(500, *x.shape[1:]) for x in face)), 4000
    for step in range(8):
        conditional_loss(NOISE, cond_dropout=(.3, .2))(model, one, StepRandom(0, step, 500))
        conditional_loss(NOISE)(plain, one, StepRandom(0, step, 500))
    no_attrs = torch.cat([c.attrs.isnan().all(1) for _, _, c in model.calls])
    no_mask = torch.cat([(c.mask == -1).all(2).all(1) for _, _, c in model.calls])
    share = lambda x: x.float().mean().item()
    for got, want in ((no_attrs, .3), (no_mask, .2), (no_attrs & no_mask, .06), (no_attrs & ~no_mask, .24)):
        assert abs(share(got) - want) < 4*(want*(1 - want)/n)**.5
    attrs, mask = (torch.cat([getattr(c, k) for _, _, c in model.calls]) for k in ('attrs', 'mask'))
    some = lambda gone: (gone.flatten(1).any(1) & ~gone.flatten(1).all(1))                 # as often again, a part only
    assert abs(share(some(attrs.isnan())) - .7*.3*39/41) < .03 and abs(share(some(mask == -1)) - .8*.2) < .04
    named = (~attrs.isnan()).sum(1)[some(attrs.isnan())].float()
    assert 17 < named.mean() < 23 and (named <= 4).any() and (named >= 36).any(), 'from a few names to nearly all'
    free = (mask == -1)[some(mask == -1)]
    assert torch.equal(free, free.any(2)[:, :, None] & free.any(1)[:, None, :]), 'what is freed is a rectangle'
    assert ((attrs == one.attrs[0]) | attrs.isnan()).all() and ((mask == one.mask[0]) | (mask == -1)).all()
    for (x, t, _), (y, s, c) in zip(model.calls, plain.calls):
        assert torch.equal(x, y) and torch.equal(t, s) and not c.attrs.isnan().any()
    for dropout, kept in (((1., 0.), 'mask'), ((0., 1.), 'attrs')):
        model.calls.clear()
        conditional_loss(NOISE, cond_dropout=dropout)(model, one, StepRandom(0, 0, 500))
        c = model.calls[0][2]
        assert torch.equal(getattr(c, kept), getattr(one, kept)) and (c.mask == -1).all() == (kept == 'attrs')


def test_noise_and_times_differ_between_batches_and_between_faces(face):
    "Not the same noise for each batch: a published fault"
    model = Recorder()
    grey = face._replace(image=torch.zeros_like(face.image))
    list(train(model, InMemoryFaces(grey), conditional_loss(NOISE), config(steps=6)))
    xs, ts = zip(*((x, t) for x, t, _ in model.calls))
    xs, ts = torch.cat(xs).flatten(1), torch.cat(ts)
    assert len({x.numpy().tobytes() for x in xs}) == 48 and ts.unique().numel() > 40
    like = torch.corrcoef(xs)
    assert (like - torch.eye(48)).abs().max() < .1, 'and not the same noise, scaled'


def test_the_terms_add_up(face, cond):
    model = net('spatial', image_encoder=True).eval()
    make = partial(conditional_loss, NOISE)
    value = lambda **keys: make(**keys)(model, face, StepRandom(0, 3, 8))
    plain = value()
    t = StepRandom(0, 3, 8).randint(0, 1000, 8)
    with_cond = diffusion_loss(NOISE, condition_of=lambda f, d: cond)(model, face, StepRandom(0, 3, 8))
    assert torch.equal(plain, with_cond) and plain.shape == (8,)
    for nce in NCE:
        tokens = model.condition_encoder(cond).tokens
        extra = contrastive_term(model, nce, cond.attrs, tokens, face.image)
        assert extra.shape == (8,) and torch.allclose(value(nce=nce, lam=.5), plain + .5*extra, atol=1e-6)
        assert torch.equal(value(nce=nce, lam=0.), plain)
    assert torch.allclose(value(weight='p2'), plain*NOISE.alphas_cumprod.neg().add(1)[t], rtol=1e-4)
    blank = diffusion_loss(NOISE, condition_of=lambda f, d: Cond(f.attrs, 0*f.mask))(model, face, StepRandom(0, 3, 8))
    assert torch.equal(value(corruption='blank masks'), blank)


def test_a_condition_is_encoded_once_unless_some_of_it_is_dropped(face, cond):
    "An encoded condition does as well as the condition itself"
    model = net('described').eval()
    x, t = noisy()
    encoded = model.condition_encoder(cond)
    assert torch.equal(model(x, t, encoded), model(x, t, cond))
    calls = []
    model.condition_encoder.register_forward_hook(lambda *_: calls.append(1))
    for nce, dropout, times in (('', (0., 0.), 1), ('published', (0., 0.), 1), ('published', (.5, .5), 2)):
        calls.clear()
        conditional_loss(NOISE, nce=nce, cond_dropout=dropout)(model, face, StepRandom(0, 3, 8)).mean().backward()
        assert len(calls) == times, (nce, dropout)
        assert model.condition_encoder.join.weight.grad.abs().max() > 0


@pytest.mark.parametrize('kind,rows', [('flow', 'logit-normal'), ('edm', 'log-normal'), ('sample', 'log-normal')])
def test_every_process_can_be_conditioned(kind, rows, face, cond):
    "The loss is the unconditional one with the condition passed on, with its timesteps; and it falls"
    noise, model = make_scheduler(prediction=kind), net('spatial')
    loss = conditional_loss(noise, weight='min-snr', timestep_sampling=rows)
    plain = diffusion_loss(noise, weighting('min-snr', noise), lambda f, d: cond, rows)
    assert torch.equal(loss(model, face, StepRandom(0, 3, 8)), plain(model, face, StepRandom(0, 3, 8)))
    assert loss.config['timestep_sampling'] == rows != conditional_loss(noise).config['timestep_sampling']
    steps = list(train(model, InMemoryFaces(face), loss, config(steps=12, lr=2e-3)))
    assert all(s.loss == s.loss for s in steps)


def test_a_batch_may_be_cut_unless_its_faces_are_compared_or_mixed(face):
    def end(micro, **keys):
        "The losses, then all weights"
        model = net('spatial', image_encoder=keys.get('nce') == 'image')
        steps = list(train(model, InMemoryFaces(face), conditional_loss(NOISE, **keys), config(micro=micro, lr=1e-4)))
        return [*(s.loss for s in steps), torch.cat([p.detach().flatten() for p in model.parameters()])]
    for keys in (dict(cond_dropout=(.4, .3)), dict(corruption='blank masks', weight='min-snr')):
        *a, whole = end(0, **keys)
        *b, cut = end(3, **keys)
        assert a == pytest.approx(b, abs=1e-5) and torch.allclose(whole, cut, atol=2e-4)
    words = 'compares or mixes the faces of a batch, and this is a slice of 3 of 8: train with micro=0, in one process'
    shuffled = [dict(corruption=c) for c in ('shuffled masks', 'shuffled attrs')]
    for keys in (dict(nce='published'), dict(nce='image'), *shuffled):
        with pytest.raises(ValueError, match=words):
            end(3, **keys)


def test_stopped_and_started_again_ends_with_the_same_bits(face, tmp_path):
    "Dropout of the attribute network, dropping, the contrastive term: all chance is named by the step"
    loss = conditional_loss(NOISE, nce='published', cond_dropout=(.3, .3), weight='p2')
    cfg = config(steps=5, batch=4, save_every=2, ema=.9, flip=True)
    list(train(net('described'), InMemoryFaces(face), loss, cfg, tmp_path/'whole'))
    for step in train(net('described'), InMemoryFaces(face), loss, cfg, tmp_path/'cut'):
        if step.step == 3: break
    assert [s.step for s in train(net('described'), InMemoryFaces(face), loss, cfg, tmp_path/'cut')] == [3, 4, 5]
    assert (tmp_path/'whole/state.safetensors').read_bytes() == (tmp_path/'cut/state.safetensors').read_bytes()
    for other in (dict(cond_dropout=(.3, .2)), dict(nce='soft'), dict(corruption='blank masks'), dict(weight='')):
        with pytest.raises(ValueError, match='loss is .* there'):
            keys = {**dict(nce='published', cond_dropout=(.3, .3), weight='p2'), **other}
            list(train(net('described'), InMemoryFaces(face), conditional_loss(NOISE, **keys), cfg, tmp_path/'cut'))


@pytest.mark.parametrize('keys,words', [
    (dict(nce='clip'), "unknown contrastive loss 'clip': it must be one of empty, published"),
    (dict(corruption='blank'), "unknown corruption 'blank': it must be one of true, blank masks"),
    (dict(weight='snr'), "unknown weighting 'snr'"),
    (dict(timestep_sampling='late'), "unknown timestep_sampling 'late'"),
    (dict(cond_dropout=.1), 'two shares between 0 and 1.*not 0.1'),
    (dict(cond_dropout=(0., 1.5)), r'not \(0.0, 1.5\)')])
def test_unknown_words_are_refused_before_training(keys, words):
    with pytest.raises(ValueError, match=words):
        conditional_loss(NOISE, **keys)


def test_the_image_loss_needs_its_encoder(face):
    with pytest.raises(ValueError, match='compares attributes with faces'):
        conditional_loss(NOISE, nce='image')(net('spatial'), face, StepRandom(0, 0, 8))
