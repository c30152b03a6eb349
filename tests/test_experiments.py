"""The table of experiments fits its notebooks, and names, jobs and fingerprints follow from it."""
import nbformat, papermill, pytest

from facegen.study import experiments


@pytest.mark.parametrize('scale', experiments.SCALES)
@pytest.mark.parametrize('name', experiments.EXPERIMENTS)
def test_every_experiment_fits_its_notebook(name, scale):
    "Each argument of each experiment at each scale is declared by the notebook, with a value of the declared type"
    job = experiments.job(experiments.run_name(name, scale, 1))
    known = papermill.inspect_notebook(str(experiments.notebook_path(job['notebook'])))
    assert experiments.unknown_params(job['notebook'], job['params']) == []
    for k, v in job['params'].items():
        assert type(v).__name__ == known[k]['inferred_type_name'], (k, v)


def test_every_name_of_a_scale_is_a_notebook_or_an_experiment():
    "A scale that spells one wrongly would be ignored"
    notebooks = {e.notebook for e in experiments.EXPERIMENTS.values()}
    for scale, given in experiments.SCALES.items():
        assert given.keys() <= notebooks | experiments.EXPERIMENTS.keys(), scale


@pytest.mark.parametrize('notebook', sorted({e.notebook for e in experiments.EXPERIMENTS.values()}))
def test_a_parameters_cell_is_its_own_help(notebook):
    "Every parameter has a type, a default of that type and a comment"
    for name, p in papermill.inspect_notebook(str(experiments.notebook_path(notebook))).items():
        assert p['inferred_type_name'] != 'None' and p['help'], name
        assert type(experiments.default_params(notebook)[name]).__name__ == p['inferred_type_name'], name


def test_names_go_there_and_back():
    for name in experiments.EXPERIMENTS:
        for scale in experiments.SCALES:
            run = experiments.run_name(name, scale, 3)
            assert experiments.parse_name(run) == (experiments.EXPERIMENTS[name], scale, 3)
    for bad in ('unet', 'unet-laptop', 'unet-desktop-s0', 'vnet-laptop-s0', '_unet-laptop-s0', 'unet-laptop-s01'):
        with pytest.raises(ValueError, match='names no run'):
            experiments.parse_name(bad)


def test_a_wrong_name_is_answered_with_the_nearest_right_one():
    for call, wrong, right in (
            (experiments.check_scale, 'labtop', 'laptop'),
            (experiments.check_experiments, ['attrs', 'spatail'], 'spatial'),
            (experiments.parse_name, 'spatail-laptop-s2', 'spatial-laptop-s2'),
            (experiments.parse_name, 'unet-laptop', 'unet-laptop-s0'),
            (experiments.run_names, 'smok', 'smoke')):
        with pytest.raises(ValueError, match=f"did you mean '{right}'"):
            call(wrong)
    with pytest.raises(ValueError, match="no experiment 'qqq': choose among classifier, parser"):
        experiments.run_names('laptop', 1, ['qqq'])


def test_judges_are_shared_by_all_seeds():
    shared = ['classifier-laptop-s0', 'autoencoder-laptop-s0', 'classifier32-laptop-s0']
    assert experiments.job('unet-laptop-s2')['needs'] == shared
    seeds = [f'unet-laptop-s{s}' for s in range(3)]
    runs = experiments.run_names('laptop', 3, ['classifier', 'parser', 'unet'])
    assert runs == ['classifier-laptop-s0', 'parser-laptop-s0', *seeds]


@pytest.mark.parametrize('scale', ['smoke', 'demo', 'laptop', 'gpu'])
def test_what_is_sampled_from_another_network_takes_that_of_its_own_seed_and_shares_its_training(scale):
    for name, trained in experiments.SAMPLED_FROM.items():
        if scale not in experiments.EXPERIMENTS[name].scales: continue
        mine, its = (experiments.job(experiments.run_name(k, scale, 2)) for k in (name, trained))
        assert experiments.run_name(trained, scale, 2) in mine['needs']
        assert mine['params']['pipeline'] == f"data/runs/{experiments.run_name(trained, scale, 2)}/pipeline"
        sampling = {'attrs_scale', 'mask_scale', 'guidance_interval', 'sampling_steps', 'pipeline', 'run'}
        keys = mine['params'].keys() | its['params'].keys()
        assert {k for k in keys if mine['params'].get(k) != its['params'].get(k)} <= sampling


def test_below_the_published_scale_families_work_in_latents_and_details_in_pixels():
    for scale in ('laptop', 'gpu'):
        for name, e in experiments.EXPERIMENTS.items():
            p = experiments.job(experiments.run_name(name, scale, 0))['params']
            if e.notebook not in ('32_unconditional', '34_conditional') or scale not in e.scales: continue
            in_pixels = p.get('autoencoder', '') == ''
            assert in_pixels == (not p['network'].endswith('_latent')), name
            assert not (name in experiments.CHAIN and in_pixels), name
    assert all(not experiments.job(f'{k}-paper-s0')['params']['autoencoder'] for k in ('unet', 'dit-s', 'r3'))


def test_the_segformer_of_one_experiment_is_made_first_at_every_scale():
    "Where the others name one of the hub, and where they name none"
    for scale in ('smoke', 'laptop', 'gpu', 'paper'):
        made = experiments.run_name('segformer', scale, 0)
        mine, other = (experiments.job(experiments.run_name(k, scale, 2)) for k in ('described+parsing', 'described'))
        assert mine['params']['segformer'] == f'data/runs/{made}/segformer' and made in mine['needs']
        assert made not in other['needs']
        differ = {k for k in mine['params'] if mine['params'][k] != other['params'].get(k)}
        assert differ == {'segformer', 'run'}
    assert experiments.job('segformer-paper-s0')['params']['weights'] == other['params']['segformer']
    assert experiments.find_experiment('described+parsing@mine').needs['segformer'] == ('segformer@mine', 'segformer')


def test_no_argument_reaches_a_notebook_as_none():
    for name in experiments.EXPERIMENTS:
        for scale in experiments.SCALES:
            assert None not in experiments.job(experiments.run_name(name, scale, 0))['params'].values()


def test_faces_are_looked_up(tmp_path, monkeypatch):
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    monkeypatch.chdir(tmp_path)
    assert 'parser-pairs128-laptop-s0' not in experiments.run_names('laptop')
    (tmp_path/'real'/'pairs128').mkdir(parents=True)
    monkeypatch.setenv('FACEGEN_FACES', str(tmp_path/'real'))
    assert 'parser-pairs128-laptop-s0' in experiments.run_names('laptop')
    with pytest.raises(FileNotFoundError, match='FACEGEN_FACES'):
        experiments.find_faces('celeba65')


def test_fingerprint_follows_arguments_and_code_but_not_prose(tmp_path, monkeypatch):
    a = experiments.fingerprint('unet-laptop-s0')
    assert a != experiments.fingerprint('unet-laptop-s1')
    nb = nbformat.read(experiments.notebook_path('32_unconditional'), 4)
    monkeypatch.setattr(experiments, 'notebook_path', lambda _: tmp_path/'n.ipynb')
    nb.cells[0].source += ' More prose.'
    nbformat.write(nb, tmp_path/'n.ipynb')
    assert experiments.fingerprint('unet-laptop-s0') == a
    nb.cells[-1].source += '\n1 + 1'
    nbformat.write(nb, tmp_path/'n.ipynb')
    assert experiments.fingerprint('unet-laptop-s0') != a


def test_the_lottery_trains_nine_times_and_samples_three_times():
    "Each run is named, what it samples from is trained before it, and nothing differs but seeds"
    runs = experiments.lottery('laptop')
    names = [one['run'] for one in runs]
    assert len(set(names)) == 81 and {one['experiment'] for one in runs} == set(experiments.LOTTERY)
    plain = experiments.job('attrs-laptop-s0')['params']
    for i, one in enumerate(runs):
        this = experiments.job(one['run'])
        p = experiments.default_params('34_conditional') | this['params']
        trained = this['needs'][-1] if 'pipeline' in this['params'] else one['run']
        assert trained in names[:i + 1], 'a network is trained before others sample from it'
        q = experiments.default_params('34_conditional') | experiments.job(trained)['params']
        def seed(p, source): return p['seed'] if p[f'{source}_seed'] < 0 else p[f'{source}_seed']
        assert [seed(q, k) for k in ('weights', 'order', 'noise')] == [one[k] for k in ('weights', 'order', 'noise')]
        assert seed(p, 'sampling') == one['sampling']
        if one['experiment'] == 'attrs':
            differ = {k for k in p if p[k] != plain.get(k, p[k])}
            assert differ <= {'run', 'seed', 'weights_seed', 'order_seed', 'noise_seed', 'sampling_seed', 'pipeline'}
    assert not {*experiments.lottery_rows()} & {*experiments.EXPERIMENTS} and len(experiments.lottery_rows()) == 81
    for wrong in ('uncond-w0o1n1-laptop-s0', 'uncond-x9-laptop-s0', 'dit-s-x1-laptop-s0'):
        with pytest.raises(ValueError, match='names no run'):
            experiments.parse_name(wrong)
