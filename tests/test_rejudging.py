"""Samples that are measured again give the numbers of their run; what is kept belongs to the samples of now."""
import re, shutil
from pathlib import Path

import pytest
import torch
from conftest import run_cells

from facegen.core import bootstrap_size, load_result, save_result
from facegen.data.faces import load_faces, random_subset, split
from facegen.evaluation import rejudging
from facegen.evaluation.metrics import record
from facegen.evaluation.samples import round_to_8bit, samples_picture, save_samples
from facegen.study import commands
from facegen.study.runner import results
from facegen.synthetic.toyfaces import pack_toyfaces

torch.set_num_threads(1)
REPO = Path(__file__).resolve().parents[1]
JUDGES = {k: str(REPO/'data/weights'/f'{k}-laptop-s0'/'judge') for k in ('classifier', 'classifier32')}
RUN = '_rejudged'
PARAMS = dict(faces='toy', n_faces=64, size=32, scheme='paper', samples=8, seed=0, n_bootstrap=20)


@pytest.fixture(scope='module')
def root_of_all(tmp_path_factory):
    "One root, so that faces are rendered once"
    folder = tmp_path_factory.mktemp('rejudged')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FACEGEN_ROOT', str(folder))
        m.setenv('FACEGEN_OUT', '')
        yield folder


@pytest.fixture
def home(root_of_all):
    "Nothing judged yet"
    for path in (root_of_all/'data').glob('judged/*'):
        path.unlink()
    return root_of_all


@pytest.fixture(scope='module')
def packed(root_of_all): return load_faces(pack_toyfaces(root_of_all/'data/faces/toy-64-32', 64, 32))


@pytest.fixture
def kept(home, packed):
    "A run that was made up: its samples are faces that were drawn, and its result says one number"
    images = round_to_8bit(packed.subset(slice(0, 8))[:].image)
    save_samples(images, RUN)
    miou = record('miou', lambda rows: .5, lambda rows: .1, 8)
    save_result(RUN, PARAMS | dict(small_classifier=JUDGES['classifier32']), [miou])
    return images


def judge(capsys, *words):
    "What the command says, and what it ends with"
    end = 0
    try:
        commands.main(['judge', *words])
    except SystemExit as e:
        end = e.code
    return capsys.readouterr().out, end


# The same numbers as the run

CONDITIONAL = dict(run=RUN, classifier=JUDGES['classifier'], small_classifier=JUDGES['classifier32'], steps=2)
UNCONDITIONAL = dict(run=RUN, classifier=JUDGES['classifier32'], steps=2, samples=8, sampling_steps=2, n_bootstrap=20,
                     measured_on='judge')


@pytest.mark.parametrize('notebook, arguments, eyes', [
    ('34_conditional', CONDITIONAL | dict(outside='efficientnet-lite0'), ['classifier', 'classifier32',
                                                                        'efficientnet-lite0', 'high-frequency']),
    ('34_conditional', CONDITIONAL | dict(limit=60, part='train', seed=3), ['classifier32', 'high-frequency']),
    ('32_unconditional', UNCONDITIONAL, ['classifier32', 'high-frequency'])])
def test_a_run_is_measured_again_with_the_same_numbers(home, capsys, notebook, arguments, eyes):
    shutil.rmtree(home/'data'/'runs', ignore_errors=True)
    run_cells(notebook, **arguments)
    said, end = judge(capsys, RUN, *(word for eye in eyes for word in ('--eye', eye)))
    distances = [eye for eye in eyes if eye != 'high-frequency']
    assert end == 0 and said.count('(as in the result)') == 2*len(distances) + 1 and '(new)' not in said
    result, found = load_result(RUN), {r['metric']: r for r in rejudging.judged(RUN)}
    assert set(found) == {f'{k}_{eye}' for k in ('kid', 'frechet') for eye in distances} | {'high_frequency'}
    for r in found.values():
        was = rejudging.same_in_result(result, r)
        for k in ('value', 'low', 'high', 'reference', 'n'):
            assert r[k] == pytest.approx(was[k], rel=1e-4, abs=1e-4), (r['metric'], k)


def test_an_adapted_network_is_compared_with_faces_that_nobody_asked_for(packed):
    "As 37_lora does: the prompts are of the first test faces"
    test = packed.subset(split(packed)['test'])
    real, other = rejudging.compared_faces(packed, PARAMS | dict(caption_scheme='plain'), 4)
    assert torch.equal(real, test[4:8].image)
    same, again = rejudging.compared_faces(packed, PARAMS, 4)
    assert torch.equal(same, random_subset(test, 4, 'reference')[:].image) and torch.equal(again, other)
    with pytest.raises(ValueError, match='9 samples need as many real faces'):
        rejudging.compared_faces(packed, PARAMS | dict(caption_scheme='plain'), 9)


def test_a_number_that_differs_is_said(kept):
    found = record('high_frequency', lambda rows: 2., lambda rows: 0., 8) | dict(network=None)
    said = rejudging.beside_result(found | dict(value=1.), dict(metrics=[found]))
    assert said.endswith('(the result says 2.000)')
    assert rejudging.beside_result(found, dict(metrics=[found])).endswith('(as in the result)')


@pytest.mark.parametrize('tags', [dict(weights='raw'), dict(equal_steps=False), dict(chosen=False)])
def test_distances_of_other_samples_are_passed_over(tags):
    def r(value, **more): return dict(metric='kid_x', value=value, network='net') | more
    assert rejudging.same_in_result(dict(metrics=[r(1, **tags), r(2)]), r(0))['value'] == 2
    assert rejudging.same_in_result(dict(metrics=[r(1, **tags)]), r(0)) is None


def test_the_bootstrap_of_the_process_stays_as_it_was(kept, packed):
    before = bootstrap_size()
    eyes = {'high-frequency': None}
    first = rejudging.measure_samples(kept, eyes, packed, PARAMS)
    assert first == rejudging.measure_samples(kept, eyes, packed, PARAMS) and bootstrap_size() == before


# Kept

def test_eyes_are_kept_beside_each_other(kept, capsys):
    judge(capsys, RUN, '--eye', 'high-frequency')
    one, = rejudging.judged(RUN)
    judge(capsys, RUN, '--eye', 'classifier32')
    judge(capsys, RUN, '--eye', 'high-frequency')
    was = ['high_frequency', 'frechet_classifier32', 'kid_classifier32']
    assert [r['metric'] for r in rejudging.judged(RUN)] == was
    assert rejudging.judged(RUN)[0] == one
    assert rejudging.judged('_nothing') == []
    assert len(rejudging.judged_path(RUN).read_text().splitlines()) == 3, 'a record a line'


def test_records_of_other_samples_do_not_pass(kept, capsys):
    judge(capsys, RUN, '--eye', 'high-frequency')
    save_samples(kept.flip(0), RUN)
    with pytest.raises(ValueError, match=f'about other samples than those of {RUN} now: delete it and run `facegen'):
        rejudging.judged(RUN)
    samples_picture(RUN).unlink()
    assert len(rejudging.judged(RUN)) == 1, 'where samples are not at hand, records are read'


@pytest.mark.parametrize('text', ['[{"metric": "kid_x", "val', '[{"metric": "kid_x", "value": 1}]', '{"a": 1}', '[1]'])
def test_a_damaged_file_is_refused(kept, text, capsys):
    rejudging.judged_path(RUN).parent.mkdir(exist_ok=True)
    rejudging.judged_path(RUN).write_text(text)
    with pytest.raises(ValueError, match=f'{RUN}.json: .*; delete it and run `facegen judge {RUN}` again'):
        rejudging.judged(RUN)
    assert 'delete it' in judge(capsys, RUN, '--eye', 'high-frequency')[1]
    assert rejudging.judged_path(RUN).read_text() == text


# Bad input, before anything is computed

@pytest.mark.parametrize('words, message', [
    (['nobody', '--eye', 'classifier'], 'no result at .*nobody.json'),
    ([RUN], 'no eye was named: choose among classifier, classifier32'),
    ([RUN, '--eye', 'clasifier'], "no eye 'clasifier' .did you mean 'classifier'"),
    ([RUN, '--eye', 'high-frequency', '--eye', 'face-recognition'], 'run `facegen eyes`'),
    ([RUN, '--eye', 'classifier'], 'no feature network .*classifier-laptop-s0')])
def test_what_is_missing_is_said_first(kept, capsys, monkeypatch, words, message):
    monkeypatch.setattr(commands, 'pack', lambda *a: pytest.fail('faces were packed'))
    said, end = judge(capsys, *words)
    assert said == '' and re.search(message, end) and len(end.splitlines()) == 1
    assert not rejudging.judged_path(RUN).exists()


def test_a_run_without_its_samples_cannot_be_judged(kept, capsys):
    save_samples(kept[:4], RUN)
    assert 'holds 4 samples, and the result of _rejudged is about 8' in judge(capsys, RUN, '--eye', 'classifier')[1]
    samples_picture(RUN).unlink()
    assert 'the samples of _rejudged are not at' in judge(capsys, RUN, '--eye', 'classifier')[1]
    save_result(RUN, dict(size=32), [record('miou', lambda rows: .5, lambda rows: .1, 8)])
    assert 'does not say samples, scheme, seed' in judge(capsys, RUN, '--eye', 'classifier')[1]


def test_help_names_every_eye(capsys):
    with pytest.raises(SystemExit):
        commands.main(['judge', '--help'])
    said = ' '.join(capsys.readouterr().out.split())
    assert all(re.search(rf'[\s,]{eye}\b', said) for eye in rejudging.EYES)


def test_a_scale_is_judged_once_and_stands_among_the_results(home, kept, packed, capsys):
    run = '_attrs-smoke-s0'
    shutil.copyfile(samples_picture(RUN), samples_picture(run))
    result = load_result(RUN)
    save_result(run, result['params'], result['metrics'])
    out, end = judge(capsys, 'smoke', '--eye', 'high-frequency')
    assert not end and out.startswith(run) and 'high_frequency' in out
    r = results('smoke')
    assert list(r[r.run == run].metric) == ['miou', 'high_frequency'] and set(r.row) == {'attrs'}
    assert list(results('smoke', judged=False).metric) == ['miou']
    assert judge(capsys, 'smoke', '--eye', 'high-frequency') == ('', 0), 'nothing is left to do'
    out, end = judge(capsys, 'smoke', '--eye', 'classifier32')
    assert not end and 'kid_classifier32' in out
    for path in (samples_picture(run), home/'data/results'/f'{run}.json'):
        path.unlink()
