"""Autoencoders go there and back, codes live, the scale is measured, and every face is encoded once."""
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torchmetrics.functional.image import peak_signal_noise_ratio

from facegen.core import generator
from facegen.data.faces import Face, flip_faces, load_faces, prepare
from facegen.diffusion.losses import StepRandom
from facegen.evaluation import reconstruction
from facegen.evaluation.judges import Classifier, Parser
from facegen.models import autoencoder, latents
from facegen.synthetic.toyfaces import render_faces, write_toyfaces
from facegen.training.config import InMemoryFaces, TrainConfig

SMALL = dict(widths=(8, 16), codes=64)
TWO = dict(block_out_channels=(8, 8), norm_num_groups=4)
DOWN, UP = ('DownEncoderBlock2D',)*2, ('UpDecoderBlock2D',)*2


def kl():
    return AutoencoderKL(3, 3, DOWN, UP, latent_channels=4, **TWO).eval()


def tiny():
    return AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()


def plain():
    return VQModel(3, 3, DOWN, UP, latent_channels=3, num_vq_embeddings=32, **TWO).eval()


def small():
    return autoencoder.make_autoencoder(**SMALL).eval()


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('toy')
    return load_faces(prepare(write_toyfaces(tmp/'raw', 40, size=32), tmp/'packed', size=32))


@pytest.fixture(scope='module')
def faces():
    return InMemoryFaces(render_faces(n=96, size=32, seed=0))


cfg = TrainConfig(steps=24, batch=4, lr=3e-3, warmup=2, ema=0., weight_decay=0., save_every=5)


# ---- there and back

@pytest.mark.parametrize('make, f, c', [(kl, 2, 4), (tiny, 2, 4), (plain, 2, 3), (small, 4, 3)],
                         ids=['kl', 'tiny', 'plain', 'space-to-depth'])
def test_every_kind_goes_there_and_back(make, f, c):
    torch.manual_seed(0)
    model, x = make(), torch.rand(2, 3, 32, 32)*2 - 1
    z = autoencoder.encode(model, x)
    y = autoencoder.decode(model, z)
    assert autoencoder.downsampling(model) == f
    assert z.shape == (2, c, 32//f, 32//f) and z.dtype == torch.float32 and not z.requires_grad
    assert y.shape == x.shape and y.abs().max() <= 1
    assert torch.allclose(autoencoder.encode(model, x[:1]), z[:1], atol=1e-5)  # a face does not depend on its batch
    with pytest.raises(ValueError, match=f'image size 31 must be divisible by {f}'):
        autoencoder.encode(model, x[..., :31])


def test_latents_are_what_the_library_calls_them():
    x = torch.rand(2, 3, 16, 16)*2 - 1
    with torch.no_grad():
        model = kl()
        assert torch.equal(autoencoder.encode(model, x), model.encode(x).latent_dist.mode())
        model = plain()
        z = model.encode(x).latents
        assert torch.equal(autoencoder.encode(model, x), z)
        assert torch.equal(autoencoder.decode(model, z), model.decode(z).sample.clamp(-1, 1))
        model = tiny()
        assert torch.equal(autoencoder.encode(model, x), model.encode(x).latents)


def test_quantising_is_what_the_library_does_and_quantising_twice_changes_nothing():
    model = small()
    z = autoencoder.encode(model, render_faces(n=3, size=32).image)
    q, _, (_, _, theirs) = model.quantize(z)
    codes = autoencoder.nearest_codes(model, z)
    assert torch.equal(codes.flatten(), theirs.flatten())
    assert torch.allclose(autoencoder.lookup_codes(model, codes), q, atol=1e-6)
    assert torch.equal(autoencoder.nearest_codes(model, q), codes)
    assert torch.allclose(autoencoder.decode(model, z), autoencoder.decode(model, q, quantise=False), atol=1e-6)


def test_the_shape_of_an_autoencoder_is_checked_and_named():
    for n, f in ((1, 1), (1, 4), (2, 4), (3, 4), (2, 8)):
        assert autoencoder.downsampling(autoencoder.make_autoencoder((8,)*n, f)) == f
    with pytest.raises(ValueError, match='4 levels downsample by 8, which does not divide 4'):
        autoencoder.make_autoencoder((8,)*4, 4)
    a, b, c = (autoencoder.make_autoencoder(seed=s, **SMALL).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


# ---- training, and codes that stay in use

def loss_of(model, x, **options):
    return autoencoder.vq_loss(x, **options)(model, Face(x, x, x), StepRandom(0, 0, len(x)))


def test_the_loss_is_one_value_a_face_and_its_codebook_terms_are_the_librarys():
    model, x = small(), render_faces(n=4, size=32).image
    each = loss_of(model, x)
    assert each.shape == (4,) and torch.allclose(each[1:2], loss_of(model, x[1:2]), atol=1e-5)
    z = autoencoder.encode(model, x)
    model.quantize.legacy = False
    with torch.no_grad():
        q, codebook, _ = model.quantize(z)
        y = model.decode(q, force_not_quantize=True).sample
        error = y - torch.nn.functional.pixel_unshuffle(x, 2)
        assert torch.allclose(each.mean(), codebook + error.abs().mean() + error.square().mean(), atol=1e-5)


def test_before_its_step_the_codebook_is_not_decoded_and_afterwards_gradients_pass_through_it():
    x = render_faces(n=4, size=32).image
    for warmup_steps in (0, 1):
        model = small()
        loss_of(model, x, warmup_steps=warmup_steps, commitment=0.).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads.values()), warmup_steps
    model = small()
    before = loss_of(model, x, warmup_steps=1, commitment=9.)
    assert torch.equal(before, loss_of(model, x, warmup_steps=1, commitment=0.))
    assert (loss_of(model, x, commitment=9.) > loss_of(model, x, commitment=0.)).all()


def test_a_restart_moves_the_dead_codes_and_only_the_dead():
    model = small()
    z = autoencoder.encode(model, render_faces(n=16, size=32).image)
    old = model.quantize.embedding.weight.clone()
    used = autoencoder.nearest_codes(model, z).unique()
    moved = autoencoder.restart_codes(model, z, generator('test'))
    new = model.quantize.embedding.weight
    same = (new == old).all(1)
    assert moved == len(old) - len(used) and same[used].all() and int(same.sum()) == len(used)
    points = z.movedim(1, -1).flatten(0, -2)
    assert all((points == code).all(1).any() for code in new[~same])
    assert len(autoencoder.nearest_codes(model, z).unique()) > len(used)


def test_warm_up_and_restarts_keep_codes_in_use(faces):
    def fit(**options):
        return autoencoder.fit_autoencoder(faces, replace(cfg, steps=40), **SMALL, **options)
    count = lambda m: len(autoencoder.nearest_codes(m, autoencoder.encode(m, faces[:32].image)).unique())
    without, restarted = fit(warmup_share=0., codebook_restarts=0), fit(warmup_share=.2, codebook_restarts=4)
    assert count(restarted) > count(without) + 8
    assert not any(p.requires_grad for p in restarted.parameters()) and not restarted.training


def test_dead_codes_are_moved_once_a_step_however_it_is_sliced(monkeypatch):
    x, calls = render_faces(n=4, size=32).image, []
    monkeypatch.setattr(autoencoder, 'restart_codes', lambda model, z, g: calls.append(len(z)))
    loss, model = autoencoder.vq_loss(x, 0, (1, 3)), small()
    for _ in range(2):  # a loss may serve two trainings
        for step in range(4):
            for a in (0, 2):
                loss(model, Face(x[a:a+2], x[a:a+2], x[a:a+2]), StepRandom(0, step, 4, a, a+2))
    assert len(calls) == 4


def test_a_stopped_training_goes_on_to_the_same_bits_across_a_restart(faces, tmp_path):
    class Stop(Exception): pass
    def stop_at(n):
        def callback(model, s):
            if s.step == n: raise Stop
        return callback
    options = dict(**SMALL, warmup_share=.2, codebook_restarts=4)
    whole = autoencoder.fit_autoencoder(faces, cfg, **options)
    for n in (5, 9, 17):  # quantising begins at 4; codes are moved at 4, 6, 8, 10
        with pytest.raises(Stop):
            autoencoder.fit_autoencoder(faces, cfg, tmp_path/'run', callback=stop_at(n), **options)
    again = autoencoder.fit_autoencoder(faces, cfg, tmp_path/'run', **options)
    a, b = whole.state_dict(), again.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and whole.config.scaling_factor == again.config.scaling_factor
    with pytest.raises(ValueError, match='belongs to another run'):
        autoencoder.fit_autoencoder(faces, cfg, tmp_path/'run', **options | dict(warmup_share=.4))


# ---- loading one

def test_an_autoencoder_comes_from_a_folder_whatever_its_kind(tmp_path):
    for model in (kl(), tiny(), plain(), small()):
        where = tmp_path/type(model).__name__
        shutil.rmtree(where, ignore_errors=True)
        model.save_pretrained(where/'autoencoder')
        for args in ((where/'autoencoder',), (where, 'autoencoder')):
            got, name = latents.load_autoencoder(*map(str, args))
            x = torch.rand(1, 3, 16, 16)
            assert type(got) is type(model) and name == where.name
            assert torch.equal(latents.encode(got, x), autoencoder.encode(model, x))
            assert not got.training and not any(p.requires_grad for p in got.parameters())


def test_nothing_given_means_fresh_weights_and_always_the_same(tmp_path):
    (a, name), (b, _) = latents.load_autoencoder(), latents.load_autoencoder()
    assert name == 'untrained' and latents.downsampling(a) == 4
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_what_is_no_autoencoder_is_refused_with_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match='31_autoencoder'):
        latents.load_autoencoder(str(tmp_path))
    (tmp_path/'config.json').write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match='UNet2DModel, not an autoencoder: expected one of VQModel, AutoencoderKL'):
        latents.load_autoencoder(str(tmp_path))
    for name in (str(tmp_path/'none'), 'nobody/nothing'):
        with pytest.raises(FileNotFoundError, match='pass a folder'):
            latents.load_autoencoder(name)


# ---- the scale

def test_the_scale_makes_latents_as_large_as_noise_and_is_saved_with_the_weights(faces, tmp_path):
    z = torch.randn(100, 3, 4, 4)*5 + .3
    assert abs((z*latents.measure_scale(z)).std() - 1) < 1e-5
    assert abs(latents.measure_scale(z*7) - latents.measure_scale(z)/7) < 1e-6
    with pytest.raises(ValueError, match='collapsed'):
        latents.measure_scale(torch.ones(3, 3))
    assert VQModel().config.scaling_factor == .18215  # the trap
    model = autoencoder.fit_autoencoder(faces, replace(cfg, steps=4), **SMALL)
    model.save_pretrained(tmp_path/'autoencoder')
    saved = latents.load_autoencoder(str(tmp_path/'autoencoder'))[0].config.scaling_factor
    measured = latents.measure_scale(autoencoder.encode(model, faces[:].image))
    assert saved == model.config.scaling_factor and abs(saved/measured - 1) < .1


# ---- the cache

def build(faces, tmp_path, model=None, **options):
    return latents.cache_latents(faces, model or small(), 'small', 32, tmp_path/'latents', **options)


@pytest.fixture
def shards(monkeypatch):
    monkeypatch.setattr(latents, 'SHARD', 16)


def test_both_flips_are_encoded_and_come_with_their_masks(packed, tmp_path, shards):
    model = small()
    got, n = build(packed, tmp_path, model), len(packed)
    rows = [0, 15, 16, 39]
    face, plain, mirrored = packed[rows], got[rows], got[[n + r for r in rows]]
    assert len(got) == 2*n and (got.channels, got.grid, got.size) == (3, 8, 32)
    assert got.ids[:n] == packed.ids and len(set(got.ids)) == 2*n
    assert torch.allclose(plain.image, autoencoder.encode(model, face.image)*got.scale, atol=1e-5)
    assert torch.allclose(mirrored.image, autoencoder.encode(model, face.image.flip(-1))*got.scale, atol=1e-5)
    assert torch.equal(plain.mask, face.mask) and torch.equal(mirrored.mask, flip_faces(face).mask)
    assert plain.mask.dtype == torch.int64
    assert torch.equal(plain.attrs, face.attrs) and torch.equal(mirrored.attrs, face.attrs)
    one, two, part = got[3], got[torch.tensor([3, 4])], got[3:5]
    assert torch.equal(one.image, two.image[0]) and torch.equal(two.image, part.image)
    assert torch.equal(got[[]].attrs, torch.empty(0, 40))


def test_the_scale_is_measured_or_given_and_never_in_the_files(packed, tmp_path):
    got = build(packed, tmp_path)
    wrong = build(packed, tmp_path, scale=.18215)
    assert abs(got[:].image.std() - 1) < 1e-4 and wrong.scale == .18215 and wrong.folder == got.folder
    assert torch.allclose(wrong[:].image*got.scale/.18215, got[:].image, atol=1e-4)


def test_a_second_time_nothing_is_encoded(packed, tmp_path, monkeypatch):
    got = build(packed, tmp_path)
    def never(*a): raise AssertionError('encoded again')
    monkeypatch.setattr(latents, 'encode', never)
    assert torch.equal(build(packed, tmp_path)[:].image, got[:].image)
    with pytest.raises(AssertionError, match='encoded again'):
        build(packed, tmp_path, autoencoder.make_autoencoder(seed=1, **SMALL))
    with pytest.raises(AssertionError, match='encoded again'):
        build(packed.subset(range(39)), tmp_path)


def test_a_stopped_build_goes_on_where_it_was(packed, tmp_path, shards, monkeypatch):
    real, calls = latents.encode, []
    def dies(model, x):
        calls.append(len(x))
        if len(calls) == 3: raise KeyboardInterrupt
        return real(model, x)
    monkeypatch.setattr(latents, 'encode', dies)
    with pytest.raises(KeyboardInterrupt):
        build(packed, tmp_path)       # the first shard of 16 is done, the second is not
    got = build(packed, tmp_path)
    assert calls == [16, 16, 16, 16, 16, 8, 8]
    monkeypatch.setattr(latents, 'encode', real)
    assert torch.equal(got[:].image, build(packed, tmp_path/'anew')[:].image)


@pytest.mark.parametrize('hurt', [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-9], lambda b: b''],
                         ids=['a bit', 'cut off', 'empty'])
def test_a_damaged_cache_is_noticed_and_mended_by_deleting_what_is_damaged(packed, tmp_path, shards, hurt):
    got = build(packed, tmp_path)
    whole = got[:].image.clone()
    file = got.folder/'00001.safetensors'
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(hurt(data))
    with pytest.raises(ValueError, match='00001.safetensors is damaged .*: delete that file'):
        build(packed, tmp_path)
    file.unlink()
    assert torch.equal(build(packed, tmp_path)[:].image, whole)


def test_unknown_attributes_and_masks_stay_unknown(tmp_path):
    face = render_faces(n=4, size=32)
    got = build(InMemoryFaces(Face(face.image, torch.full((4, 40), torch.nan), torch.full((4, 32, 32), -1))), tmp_path)
    assert got[:].attrs.isnan().all() and (got[:].mask == -1).all()


def test_the_wrong_size_and_no_faces_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match='40 faces of 32 px cannot be cached at 64 px'):
        latents.cache_latents(packed, small(), 'x', 64, tmp_path)
    with pytest.raises(ValueError, match='0 faces'):
        latents.cache_latents(packed.subset([]), small(), 'x', 32, tmp_path)


def test_a_worker_opens_the_files_itself(packed, tmp_path):
    got = build(packed, tmp_path, scale=2.)
    sent = pickle.dumps(got)
    assert len(sent) < 1000 and torch.equal(pickle.loads(sent)[[1, 41]].image, got[[1, 41]].image)
    assert json.loads((got.folder/'cache.json').read_text())['ids'] == packed.ids


def test_real_faces_are_cached(real_faces, tmp_path):
    faces = load_faces(prepare(real_faces/'CelebAMask-HQ', tmp_path/'packed', size=32, workers=1)).subset(range(20))
    got = build(faces, tmp_path)
    assert len(got) == 2*len(faces) and abs(got[:].image.std() - 1) < 1e-3 and got[:].mask.max() <= 18


# ---- reconstruction

def test_psnr_is_the_librarys_and_the_report_orders_what_it_must(faces):
    a, b = faces[:4].image, faces[4:8].image
    theirs = torch.stack([peak_signal_noise_ratio(x, y, data_range=2.) for x, y in zip(a, b)])
    assert torch.allclose(reconstruction.psnr(a, b), theirs, atol=1e-4)
    model = small()
    report = {m['metric']: m for m in reconstruction.autoencoder_report(model, faces, 32)}
    assert set(report) == {'psnr', 'l1', 'codes_used', 'code_perplexity'}
    assert all(m['n'] == len(faces) for m in report.values())
    p, used = report['psnr'], report['codes_used']
    assert p['low'] <= p['value'] <= p['high'] and p['reference'] > p['value']  # untrained: worse than box downsampling
    in_use = len(autoencoder.nearest_codes(model, autoencoder.encode(model, faces[:].image)).unique())
    assert used['value'] == in_use/64 and 1 <= report['code_perplexity']['value'] <= in_use + 1e-6
    for make in (kl, tiny):
        report = reconstruction.autoencoder_report(make(), faces, 32)
        assert [m['metric'] for m in report] == ['psnr', 'l1'] and all(m['upper'] is None for m in report)


def test_reconstructions_keep_their_attributes_and_judges_have_the_faces_as_upper_bound(faces):
    torch.manual_seed(0)
    judge, parser = Classifier(size=32, width=8, num_features=16).eval(), Parser(size=32, width=16).eval()
    subset = InMemoryFaces(faces[:24])
    r = reconstruction.reconstruct(small(), subset, batch=10)
    assert torch.equal(r[:].attrs, subset[:].attrs) and torch.equal(r[:].mask, subset[:].mask)
    assert r.ids == subset.ids
    report = reconstruction.judge_report(subset, subset, 32, judge, parser)  # a perfect autoencoder
    assert all(m['value'] == m['upper'] and m['images'] == 'reconstructions' for m in report)
    assert {'miou', 'average_precision'} <= {m['metric'] for m in report}
    real = {(m['metric'], m.get('attribute')): m['value'] for m in report}
    report = reconstruction.judge_report(r, subset, 32, judge)
    assert report and all(m['upper'] == real[m['metric'], m.get('attribute')] for m in report)
    assert reconstruction.judge_report(r, subset, 32) == []
