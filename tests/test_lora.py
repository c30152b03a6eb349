"""Prompts, a tiny Stable Diffusion, and adapters that anybody's Stable Diffusion can open."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import run_cells
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from facegen.adaptation.lora import (
    TARGETS, LoRALinear, add_lora, base_checksum, explained_variance, load_lora, save_lora)
from facegen.adaptation.prompts import MISSING, SCHEMES, check_length, make_tokenizer, prompts
from facegen.adaptation.tiny_stable_diffusion import (
    SD2, STABLE, CaptionedBatch, CaptionedLatents, EmbeddingToImage, caption_dropout, encode_prompts, load_stable,
    make_stable, sample_texts, save_stable, tokenize, training_scheduler)
from facegen.core import generator, load_result
from facegen.data.faces import ATTRIBUTES
from facegen.diffusion.losses import StepRandom, diffusion_loss
from facegen.study import experiments
from facegen.training.config import TrainConfig
from facegen.training.loop import load_weights, train

TEXTS = ['A photo of a person with Bangs', 'A photo of a person, without Bangs', '']


@pytest.fixture(scope='module')
def pipe(): return make_stable('smoke', 32)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


def sample(pipe, **kw): return sample_texts(pipe, TEXTS, **dict(steps=2, guidance=2.) | kw)


def filled(rank=4, seed=1, **kw):
    "A denoiser whose adapter does something"
    p = make_stable('smoke', 32)
    add_lora(p.unet, rank=rank, alpha=3.*rank, **kw)
    p.unet.eval()
    g = torch.Generator().manual_seed(seed)
    for k, w in p.unet.named_parameters():
        if 'lora_B' in k:
            w.data.copy_(.05*torch.randn(w.shape, generator=g))
    return p


# --- prompts

def test_a_prompt_names_what_is_present_in_the_order_of_the_file_and_nothing_else():
    a = torch.full((1, 40), torch.nan)
    assert prompts(a) == ['A photo of a person'] and prompts(a, 'absent') == ['A photo of a person']
    a[0, [ATTRIBUTES.index(n) for n in ('Young', 'Bangs', '5_o_Clock_Shadow')]] = 1.
    a[0, ATTRIBUTES.index('Male')] = 0.
    assert prompts(a) == ['A photo of a person with 5 o Clock Shadow, Bangs, Young']
    assert prompts(a, 'absent') == ['A photo of a person with 5 o Clock Shadow, Bangs, Young, without Male']
    assert prompts(a, 'empty') == ['']
    with pytest.raises(ValueError, match='no scheme'):
        prompts(a, 'poetic')


def test_absence_is_named_only_by_the_scheme_that_names_it():
    "Two faces that differ in nothing but a known absence have one prompt or two"
    a = torch.full((2, 40), torch.nan)
    a[1, ATTRIBUTES.index(MISSING[0])] = 0.
    assert len(set(prompts(a))) == 1 and len(set(prompts(a, 'absent'))) == 2


def test_every_word_is_one_token_and_the_list_is_the_same_in_another_process():
    t = make_tokenizer()
    assert all(len(t.tokenize(w)) == 1 for a in ATTRIBUTES for w in a.split('_'))
    code = """
import json
from facegen.adaptation.prompts import make_tokenizer
print(json.dumps(make_tokenizer().get_vocab()))
"""
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                           env=os.environ | {'PYTHONHASHSEED': '77'})
    assert json.loads(other.stdout.splitlines()[-1]) == t.get_vocab()


def test_a_prompt_that_is_too_long_is_refused_with_what_would_be_lost_or_truncated_at_a_comma():
    t = make_tokenizer()
    long = prompts(torch.ones(1, 40))
    words = r"prompt 0 has 119 tokens, the text encoder reads 77: ', .*Young' would be truncated"
    with pytest.raises(ValueError, match=words):
        check_length(t, long)
    with pytest.raises(ValueError, match='prompt 1 has'):
        tokenize(make_stable('smoke', 32), [TEXTS[0], *long])
    (short,), n = check_length(t, long, truncate=True)
    assert n == 1 and long[0].startswith(short) and long[0][len(short)] == ',' and 70 < len(t(short).input_ids) <= 77
    (one,), n = check_length(t, ['hat '*200], truncate=True)
    assert n == 1 and len(t(one).input_ids) == 77  # no comma to truncate at


# --- a Stable Diffusion of our own

def test_a_saved_pipeline_is_a_stable_diffusion_folder_and_samples_the_same_pixels(pipe, tmp_path):
    save_stable(pipe, tmp_path/'sd')
    again, name = load_stable(str(tmp_path/'sd'))
    assert name == 'sd' and torch.equal(sample(again), sample(pipe))
    parts = (again.unet, again.vae, again.text_encoder)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    index = json.loads((tmp_path/'sd'/'model_index.json').read_text())
    assert index['_class_name'] == 'StableDiffusionPipeline'
    classes = dict(unet='UNet2DConditionModel', vae='AutoencoderKL', text_encoder='CLIPTextModel')
    assert {k: index[k][1] for k in classes} == classes


def test_the_tokenizer_comes_back_whole(pipe, tmp_path):
    save_stable(pipe, tmp_path/'sd')
    t = load_stable(str(tmp_path/'sd'))[0].tokenizer
    s = prompts(torch.ones(1, 40))[0]
    assert t.tokenize(s) == pipe.tokenizer.tokenize(s) and t.model_max_length == 77
    assert (t.pad_token_id, t.bos_token_id, t.eos_token_id) == (1, 0, 1)


def test_missing_models_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='hf download nobody/nothing --local-dir FOLDER'):
        load_stable('nobody/nothing')
    with pytest.raises(FileNotFoundError, match='no model_index.json'):
        load_stable(str(tmp_path))
    index = dict(_class_name='StableDiffusionPipeline', unet=['diffusers', 'UNet2DConditionModel'])
    (tmp_path/'model_index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match='cannot be opened'):
        load_stable(str(tmp_path))
    with pytest.raises(ValueError, match='no Stable Diffusion of size'):
        make_stable('huge', 32)


@pytest.mark.parametrize('preset', STABLE)
def test_presets_differ_only_in_size(preset):
    p = make_stable(preset, 32)
    c = p.unet.config
    assert p.text_encoder.config.hidden_size == c.cross_attention_dim
    assert c.sample_size*2**(len(p.vae.config.block_out_channels) - 1) == 32
    if preset == 'smoke':
        assert torch.equal(sample(p), sample(make_stable(preset, 32)))


def test_a_face_starts_from_its_own_noise_whatever_the_batch(pipe):
    assert torch.allclose(sample(pipe, batch=1), sample(pipe), atol=1e-5)
    assert not torch.allclose(sample(pipe, seed=1), sample(pipe), atol=.1)


def test_guidance_one_is_the_prompt_alone_and_the_empty_prompt_has_no_guidance(pipe):
    one, three = sample(pipe, guidance=1.), sample(pipe, guidance=3.)
    assert torch.allclose(one[2], three[2], atol=1e-4) and not torch.allclose(one[0], three[0], atol=1e-4)


def test_condition_dropout_replaces_about_its_share_of_captions():
    batch, empty = CaptionedBatch(torch.zeros(400, 4, 2, 2), torch.ones(400, 77, 3)), torch.zeros(77, 3)
    text = caption_dropout(empty, .25)(batch, StepRandom(0, 0, 400))
    gone = (text == 0).all(-1).all(-1)
    assert .17 < gone.float().mean() < .33 and (text[~gone] == 1).all()
    assert caption_dropout(empty)(batch, StepRandom(0, 0, 400)) is batch.text


# --- low-rank updates

PUBLISHED = {'to_q': 32, 'to_k': 32, 'to_v': 32, 'to_out.0': 32, 'proj_in': 16, 'proj_out': 16, 'conv': 6}


def layers_with_update(unet): return {t: sum(f'.{t}.lora_A' in k for k in unet.state_dict()) for t in TARGETS}


def test_the_published_update_has_7_483_392_weights():
    with torch.device('meta'):
        big = UNet2DConditionModel(**SD2)
        n = add_lora(big)
    assert n == 7_483_392 and sum(p.numel() for p in big.parameters() if not p.requires_grad) == 865_910_724
    assert layers_with_update(big) == PUBLISHED


def test_the_idea_and_the_library_agree():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(7, 5))
    ours = LoRALinear(torch.nn.Linear(7, 5), 3, 6.)
    ours.layer.load_state_dict(plain[0].state_dict())
    theirs = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=['0']), plain)
    p = dict(theirs.named_parameters())
    x = torch.randn(4, 7)
    ours.B.data.normal_()
    p['0.lora_A.default.weight'].data.copy_(ours.A)
    p['0.lora_B.default.weight'].data.copy_(ours.B)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert [n for n, q in ours.named_parameters() if q.requires_grad] == ['A', 'B']


def test_an_untrained_adapter_changes_nothing(pipe):
    p = make_stable('smoke', 32)
    add_lora(p.unet, rank=2)
    p.unet.eval()
    assert torch.allclose(sample(p), sample(pipe), atol=1e-6)


@pytest.mark.parametrize('targets, match', [
    ((), 'no targets'), (('to_x',), "ends in 'to_x'.*to_q"), (('to_q', 'convx'), "ends in 'convx'")])
def test_targets_that_match_nothing_are_refused(targets, match):
    u = make_stable('smoke', 32).unet
    with pytest.raises(ValueError, match=match):
        add_lora(u, targets=targets)
    assert not getattr(u, 'peft_config', None)
    with pytest.raises(ValueError, match='rank 0'):
        add_lora(u, rank=0)


def test_plain_diffusers_in_a_fresh_process_samples_the_same_pixels(pipe, tmp_path):
    save_stable(pipe, tmp_path/'sd')
    p = filled(dropout=.15)
    save_lora(p.unet, tmp_path/'ink', 'sd')
    noise = torch.randn(2, 4, 16, 16, generator=generator('noise'))
    save_file({'noise': noise}, tmp_path/'noise.safetensors')
    call = f"pipe({TEXTS[:2]!r}, latents=noise, num_inference_steps=3, guidance_scale=2., output_type='pt').images"
    code = f'''
import sys
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
torch.set_num_threads({torch.get_num_threads()})
pipe = StableDiffusionPipeline.from_pretrained('sd', safety_checker=None)
noise = load_file('noise.safetensors')['noise']
pipe.load_lora_weights('ink')
save_file({{'x': {call}}}, 'theirs.safetensors')
assert not [m for m in sys.modules if m.startswith('facegen')]
'''
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True)
    opened, _ = load_stable(str(tmp_path/'sd'))
    load_lora(opened, tmp_path/'ink')
    ours, bare, trained = (eval(call, dict(pipe=q, noise=noise)) for q in (opened, pipe, p))
    theirs = load_file(tmp_path/'theirs.safetensors')['x']
    assert torch.equal(theirs, ours) and torch.equal(theirs, trained) and not torch.allclose(theirs, bare, atol=.01)


def test_the_header_has_rank_and_alpha_and_no_dropout(tmp_path):
    save_lora(filled(dropout=.15).unet, tmp_path)
    with safe_open(tmp_path/'pytorch_lora_weights.safetensors', 'pt') as f:
        header = json.loads(f.metadata()['lora_adapter_metadata'])
    wanted = {'unet.r': 4, 'unet.lora_alpha': 12., 'unet.lora_dropout': 0.}
    assert {k: header[k] for k in wanted} == wanted and set(header['unet.target_modules']) == set(TARGETS)


def test_scale_goes_from_the_base_to_what_was_trained(pipe, tmp_path):
    p = filled()
    save_lora(p.unet, tmp_path/'ink')
    q = load_lora(make_stable('smoke', 32), tmp_path/'ink', scale=0.)
    assert torch.allclose(sample(q), sample(pipe), atol=1e-6)
    away = []
    for s in (0., .3, .6, 1.):
        q.set_adapters(['face'], [s])
        away.append(float((sample(q) - sample(pipe)).abs().mean()))
    assert away == sorted(away) and torch.allclose(sample(q), sample(p), atol=1e-6)


def test_merging_and_taking_out_again(pipe, tmp_path):
    p = filled()
    save_lora(p.unet, tmp_path/'ink')
    q = load_lora(make_stable('smoke', 32), tmp_path/'ink')
    whole = sample(q)
    q.fuse_lora(adapter_names=['face'])
    assert torch.allclose(sample(q), whole, atol=1e-4)
    q.unfuse_lora()
    assert torch.allclose(sample(q), whole, atol=1e-4)
    q.delete_adapters('face')
    assert torch.allclose(sample(q), sample(pipe), atol=1e-4)


def test_two_adapters_add_up(tmp_path):
    a, b = filled(4, 1), filled(2, 2)
    save_lora(a.unet, tmp_path/'a')
    save_lora(b.unet, tmp_path/'b')
    q = load_lora(make_stable('smoke', 32), tmp_path/'a', name='a')
    load_lora(q, tmp_path/'b', name='b')
    q.set_adapters(['a', 'b'], [.7, -.4])
    def layer(p): return p.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    def update(p): return 3*layer(p).lora_B['default'].weight@layer(p).lora_A['default'].weight
    whole = layer(q).base_layer.weight + .7*update(a) - .4*update(b)
    x = torch.randn(5, whole.shape[1])
    assert torch.allclose(layer(q)(x), x@whole.T, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_lora(filled().unet, tmp_path/'ink', 'mine')
    with pytest.raises(ValueError, match=r'made for another base \(mine\): open that one'):
        load_lora(make_stable('smoke', 32, seed=9), tmp_path/'ink')
    with pytest.raises(FileNotFoundError, match='no adapter.json'):
        load_lora(make_stable('smoke', 32), tmp_path)
    q = load_lora(make_stable('smoke', 32), tmp_path/'ink')
    with pytest.raises(ValueError, match="called 'face' already"):
        load_lora(q, tmp_path/'ink')
    with pytest.raises(ValueError, match='no adapter to save'):
        save_lora(make_stable('smoke', 32).unet, tmp_path)
    u = make_stable('smoke', 32).unet
    assert base_checksum(q.unet) == base_checksum(u) == base_checksum(u.half())


def test_explained_variance_finds_the_rank_of_an_update():
    torch.manual_seed(0)
    w = {'x.to_q.weight': torch.randn(20, 20), 'y.bias': torch.randn(20)}
    updated = {'x.to_q.weight': w['x.to_q.weight'] + torch.randn(20, 4)@torch.randn(4, 20), 'y.bias': w['y.bias'] + 1}
    e = explained_variance(w, updated)
    assert e[3] > 1 - 1e-4 > e[2] and (e.diff() >= -1e-6).all()
    with pytest.raises(ValueError, match='nothing has changed'):
        explained_variance(w, w)
    with pytest.raises(ValueError, match='no weight belongs to'):
        explained_variance(w, updated, ['to_v'])


# --- training

def examples(pipe, n=6):
    class Made:
        ids = [str(i) for i in range(n)]
        x = torch.randn(n, 4, 16, 16, generator=generator('latents'))
        def __len__(self): return n
        def __getitem__(self, rows): return CaptionedBatch(self.x[rows], None)
    texts = [TEXTS[i % 2] for i in range(n)]
    return CaptionedLatents(Made(), texts, encode_prompts(pipe, ['', *texts]))


def trained(folder, stop=None, steps=6, **kw):
    torch.manual_seed(3)
    p = make_stable('smoke', 32)
    add_lora(p.unet, rank=2, alpha=6., dropout=.3)
    model = EmbeddingToImage(p.unet)
    data = examples(p)
    loss = diffusion_loss(training_scheduler(p), condition_of=caption_dropout(data.table[0], .2))
    cfg = TrainConfig(steps=steps, batch=4, lr=1e-2, warmup=1, ema=.5, flip=False, save_every=2, **kw)
    losses = []
    for s in train(model, data, loss, cfg, folder):
        losses.append(s.loss)
        if s.step == stop: break
    return p, model, losses


def test_an_interrupted_adapter_ends_with_the_same_bits(tmp_path):
    p, m, _ = trained(tmp_path/'a')
    trained(tmp_path/'b', stop=3)
    q, n, rest = trained(tmp_path/'b')
    assert len(rest) == 4  # steps 3 to 6: the checkpoint is that of step 2
    load_weights(m, tmp_path/'a')
    load_weights(n, tmp_path/'b')
    def update(u): return {k: v for k, v in u.state_dict().items() if 'lora_' in k}
    assert all(torch.equal(v, update(q.unet)[k]) for k, v in update(p.unet).items())


def test_only_the_update_is_trained_and_no_encoder_runs(tmp_path, monkeypatch):
    before = make_stable('smoke', 32).unet.state_dict()
    p, _, losses = trained(None)
    after = {k.replace('.base_layer', ''): v for k, v in p.unet.state_dict().items() if 'lora_' not in k}
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert any((v != 0).any() for k, v in p.unet.state_dict().items() if 'lora_B' in k)
    p = make_stable('smoke', 32)
    data = examples(p)
    for part in (p.text_encoder, p.vae):
        monkeypatch.setattr(part, 'forward', lambda *a, **k: pytest.fail('an encoder ran in a training step'))
    add_lora(p.unet, rank=2)
    loss = diffusion_loss(training_scheduler(p), condition_of=caption_dropout(data.table[0]))
    for _ in train(EmbeddingToImage(p.unet), data, loss, TrainConfig(steps=2, batch=4, flip=False)):
        pass


def test_slices_and_checkpointing_change_memory_and_not_the_result():
    a = trained(None, steps=3)[2]
    b = trained(None, steps=3, micro=4)[2]
    assert a == b
    torch.manual_seed(3)
    p = make_stable('smoke', 32)
    add_lora(p.unet, rank=2, alpha=6., dropout=0.)
    data = examples(p)
    x = data[torch.arange(4)]
    t = torch.full((4,), 500)
    model = EmbeddingToImage(p.unet).train()
    grads = []
    for on in (False, True):
        if on:
            p.unet.enable_gradient_checkpointing()
        p.unet.zero_grad()
        model(x.image, t, x.text).square().mean().backward()
        grads.append([q.grad.clone() for q in p.unet.parameters() if q.grad is not None])
    assert all(torch.allclose(g, h, atol=1e-6) for g, h in zip(*grads))


# --- the run

def run(home, **params):
    _, names = run_cells('37_lora', **params)
    return load_result(params.get('run', '_smoke-lora')), names


def test_the_run_measures_every_arm_alike(home):
    arms = {'zero-shot': dict(method='none'),
            'full': dict(method='full'),
            'lora-uncond': dict(caption_scheme='empty'),
            'lora': dict(),
            'lora-silent': dict(caption_scheme='empty', prompt_scheme='published')}
    keys = None
    for name, arm in arms.items():
        out, names = run(home, run=f'_{name}', **arm)
        p = out['params']
        k = {m['metric'] for m in out['metrics']}
        keys = keys or k
        assert k == keys and p['guidance'] in map(float, p['tried'])
        assert (p['trained'] == 0) == (name == 'zero-shot')
        assert (p['explained_variance'] is not None) == (name == 'full')
        assert len(p['tried']) == (1 if name == 'lora-uncond' else 2)
        assert all(m['n'] == 4 for m in out['metrics'] if m['metric'] == 'kid') and p['trained_on'] == 16
    assert (home/'data'/'runs'/'_lora'/'adapter'/'pytorch_lora_weights.safetensors').is_file()
    assert (home/'data'/'gallery'/'__lora-preview-000005.png').is_file()
    with pytest.raises(ValueError, match="no method 'some'"):
        run(home, method='some')
    with pytest.raises(ValueError, match='n_train=10000'):
        run(home, n_train=10000)


def test_augmented_views_are_encoded_beforehand_and_keep_their_captions(home, monkeypatch):
    _, plain = run(home, previews=0)
    out, names = run(home, augmentation='v1', views=3, previews=0, run='_augmented')
    n = out['params']['trained_on']
    assert len(plain['latents']) == 2*n and len(names['latents']) == 2*3*n, 'each with its mirror image'
    texts = names['texts']
    assert texts[:n]*6 == texts and texts[:n] == plain['texts'][:n], 'three views of each face, and all of it mirrored'
    faces = names['train_faces'][range(n)].image
    apart = [(names['shown'][range(n*k, n*k + n)].image - faces).abs().mean((1, 2, 3)) for k in range(3)]
    assert min(map(float, torch.stack(apart).flatten())) > 0, 'no view is the face itself'
    assert plain['latents'].digest != names['latents'].digest and plain['losses'] != names['losses']


def test_timesteps_of_a_lora_are_drawn_as_it_says(home, monkeypatch):
    "In each third those of that third; the loss is told how far the training is"
    seen = []
    from facegen.diffusion import losses
    def spied(levels):
        def draw(rng, n):
            seen.append((rng.step, rng.steps))
            return rng.randint(0, len(levels), n)
        return draw
    monkeypatch.setitem(losses.TIMESTEP_SAMPLING, 'thirds', spied)
    _, names = run(home, timestep_sampling='thirds', previews=0, steps=4)
    assert seen == [(k, 4) for k in range(4)] and names['loss'].config['timestep_sampling'] == 'thirds'
    with pytest.raises(ValueError, match="unknown timestep_sampling 'halves'"):
        run(home, timestep_sampling='halves', run='_halves')


def real_layout(folder):
    "Stable Diffusion 2 as the hub has it, with random weights and fewer channels"
    torch.manual_seed(0)
    t = make_tokenizer()
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(t), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        hidden_act='gelu', projection_dim=16, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        pad_token_id=1))
    narrow = dict(block_out_channels=(32, 64, 64, 64), attention_head_dim=(1, 2, 2, 2), cross_attention_dim=32)
    unet = UNet2DConditionModel(**SD2 | narrow)
    vae = AutoencoderKL(block_out_channels=(32,)*4, down_block_types=('DownEncoderBlock2D',)*4, layers_per_block=2,
                        up_block_types=('UpDecoderBlock2D',)*4, latent_channels=4, sample_size=768)
    scheduler = PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', skip_prk_steps=True,
                              set_alpha_to_one=False, steps_offset=1, prediction_type='epsilon')
    pipe = StableDiffusionPipeline(vae, text, t, unet, scheduler, None, None, requires_safety_checker=False)
    save_stable(pipe, folder)
    return str(folder)


def test_the_notebook_takes_a_real_stable_diffusion_folder(home):
    base = real_layout(home/'sd2')
    out, names = run(home, base=base, size=64, steps=2, batch=2, n_train=2, samples=4, guidance_val_size=4,
                     sampling_steps=2, rank=24, alpha=72., guidance_scales='1 7.5', previews=0, checkpointing=True)
    p = out['params']
    assert p['base'] == 'sd2' and names['side'] == 8 and p['rank'] == 24
    assert names['noise'].config.prediction_type == 'epsilon' and layers_with_update(names['pipe'].unet) == PUBLISHED
    assert p['memory_mb']['total'] > p['memory_mb']['weights'] > 1


def test_a_scale_may_name_the_base_itself():
    j = experiments.job('lora-paper-s0')
    p = j['params']
    assert p['base'] == 'stabilityai/stable-diffusion-2-base' and p['rank'] == 24 and p['alpha'] == 72
    assert not [n for n in j['needs'] if n.startswith('stable')]
    j = experiments.job('lora-laptop-s1')
    assert j['params']['base'] == 'data/runs/stable-laptop-s0/pipeline' and 'stable-laptop-s0' in j['needs']
    assert experiments.job('lora-x2-paper-s0')['params']['alpha'] == 48
    assert 'lr_full' not in experiments.job('full-paper-s0')['params']
    assert set(SCHEMES) == {'empty', 'published', 'absent'}
