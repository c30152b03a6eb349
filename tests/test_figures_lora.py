"""The figures about LoRA say what their results say, and are the same bytes when drawn again."""
import pytest, torch
from conftest import run_cells
from facegen.study import experiments
from facegen import plotting
from facegen.study import runner
from facegen.core import save_result
from facegen.synthetic.toyfaces import render_faces

SCALE = 'smoke'


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


def said(metric, value, half, chance, upper, **tags):
    return dict(metric=metric, value=value, low=value - half, high=value + half, n=64, chance=chance, upper=upper,
                reference=None, network='a classifier', **tags)


def made_up(row, kid, ba=.6, seed=0, guidance=2., explained=.5, **change):
    "The result of an arm, with its strips"
    name = experiments.run_name(row, SCALE, seed)
    job = experiments.job(name)
    p = experiments.default_params(job['notebook']) | job['params'] | change
    empty = (p['prompt_scheme'] or p['caption_scheme']) == 'empty'
    lora, full = p['method'] == 'lora', p['method'] == 'full'
    g = 1. if empty else guidance
    spectrum = {str(k): explained**(1/k) for k in (1, 2, 4, 8, 16, 32, 64)}
    p |= dict(base='stable-smoke-s0', trained_on=16, trained=1000*p['rank'] if lora else 250_000*full,
              frozen=0 if full else 250_000, tried={'1': kid} if empty else {'1': kid + .2, '2': kid}, guidance=g,
              explained_variance=spectrum if full else None)
    if not lora:
        p |= dict(rank=None, alpha=None)
    tags = dict(guidance=g, chosen=True)
    metrics = [said('kid', kid, .1, -.01, .3, **tags), said('balanced_accuracy', ba, .02, .5, .9, **tags),
               said('balanced_accuracy_hidden', ba, .02, .5, .9, **tags), said('copy_share', .1, .05, 1., .1, **tags)]
    if g > 1:
        other = dict(guidance=1., chosen=False)
        metrics += [m | dict(value=m['value'] + .2, high=m['high'] + .2) | other for m in metrics]
    plotting.save_gallery(render_faces(n=8, size=32, seed=seed).image, f'{name}-chosen')
    if lora:
        faces = render_faces(n=5, size=32, seed=seed).image
        plotting.save_gallery(torch.cat([faces]*6), f'{name}-strength', ncol=5)
    save_result(name, p, metrics)


def drawn(notebook, home):
    text, _ = run_cells(notebook, scale=SCALE)
    file = home/'figures'/f'{runner.figure_name(experiments.FIGURES[notebook], SCALE)}.png'
    return file.read_bytes(), ' '.join(text.split())


def arms(base=4., full=.6, uncond=.9, lora=.5, ba=.8):
    for s in (0, 1):
        made_up('zero-shot', base, .6, s)
        made_up('full', full, .8, s)
        made_up('lora-uncond', uncond, .5, s)
        made_up('lora', lora, ba, s)


def test_lora_says_whether_it_helps_and_whether_attributes_help_more(home):
    with pytest.raises(ValueError, match="no results of experiment 'zero-shot'"):
        drawn('47_lora', home)
    arms()
    a, text = drawn('47_lora', home)
    assert text.startswith('Yes, it helps, and it helps more with attributes. KID, base -> LoRA: 4.00 -> 0.50')
    assert 'With attributes it also follows the prompt' in text
    assert drawn('47_lora', home)[0] == a and len(a) > 20_000
    arms(lora=.9, ba=.5)
    text = drawn('47_lora', home)[1]
    assert 'Yes, it helps, and no difference between with and without attributes is shown' in text
    assert 'Nor is it shown to follow the prompt better' in text
    arms(lora=5., ba=.4)
    text = drawn('47_lora', home)[1]
    assert text.startswith('No, it harms, and with attributes KID is worse')
    assert 'With attributes it follows the prompt even less' in text
    arms(base=.5, lora=.5)
    assert drawn('47_lora', home)[1].startswith('It is not shown to help')
    made_up('lora-silent', .7, prompt_scheme='published')
    made_up('zero-shot-uncond', 4.2)
    assert drawn('47_lora', home)[0] != a


def test_rank_names_the_lowest_rank_that_is_enough(home):
    arms()
    with pytest.raises(ValueError, match="no results of experiment 'lora-r1' or"):
        drawn('48_lora_rank', home)
    def swept(row, kids):
        for seed, kid in enumerate(kids):
            made_up(row, kid, seed=seed)
    rows = {'lora-r1': 1.5, 'lora-r2': .55, 'lora-r16': .5, 'lora-x1': .9, 'lora-x6': .7}
    for row, k in rows.items():
        made_up(row, k)
    assert drawn('48_lora_rank', home)[1].startswith('One seed a rank decides nothing. KID by rank: 1: 1.50, 2: 0.55')
    for row, k in rows.items():
        swept(row, (k, k))
    swept('lora-r2', (.65, .45))
    a, text = drawn('48_lora_rank', home)
    assert text.startswith('Rank 2 is enough: 0.8 % of the denoiser')
    assert 'Even rank 1 (0.4 % of the denoiser) goes from 4.00 to 1.50' in text
    assert '84 % of the variance lies in the first 4 directions' in text
    assert drawn('48_lora_rank', home)[0] == a
    swept('lora-r1', (.6, .4))
    assert drawn('48_lora_rank', home)[1].startswith('Rank 1 is enough')
    for row in ('lora-r1', 'lora-r2'):
        swept(row, (1.5, 1.5))
    assert drawn('48_lora_rank', home)[1].startswith('A lower rank than 4 costs: rank 4 -> 2, KID +1.00')


def test_scale_shows_every_scale_of_both_adapters(home):
    with pytest.raises(ValueError, match="no results of experiment 'lora'"):
        drawn('49_lora_scale', home)
    arms()
    a, _ = drawn('49_lora_scale', home)
    assert drawn('49_lora_scale', home)[0] == a and len(a) > 20_000
