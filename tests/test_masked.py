"""Masks from a parser, and sides put right: everything else of the faces stays as it was."""
import pickle, shutil
import pytest, torch
from facegen.core import seed_all
from facegen.faces import PARTS, TWINS, load_faces, prepare
from facegen.judges import Parser, resize
from facegen.masked import Masked, mend_sides, parse
from facegen.toyfaces import write_toyfaces


# Masks from a parser

@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "Nine drawn faces without masks, packed at 32 and at 64 px"
    tmp = tmp_path_factory.mktemp('bare'); write_toyfaces(tmp/'raw', 9, size=64)
    (tmp/'plain').mkdir(); shutil.copytree(tmp/'raw'/'CelebA-HQ-img', tmp/'plain'/'images')
    (tmp/'plain'/'attributes.csv').write_text('file,Smiling\n' + ''.join(f'{p.name},{i % 2}\n' for i, p in enumerate(sorted((tmp/'plain'/'images').iterdir()))))
    return [load_faces(prepare(tmp/'plain', tmp/str(size), size=size)) for size in (32, 64)]


@pytest.fixture(scope='module')
def eye(): seed_all(3); return Parser(size=32, width=16).eval()


def test_parsed_faces_have_masks_and_are_otherwise_the_same(bare, eye):
    faces, larger = bare; seen = parse(faces, eye)
    assert (faces[:].mask == -1).all() and seen.ids == faces.ids and len(seen) == 9 and seen.size == 32
    for a, b in ((seen[:].image, faces[:].image), (seen[:].attrs.nan_to_num(-1), faces[:].attrs.nan_to_num(-1)), (seen[:].mask, eye.answers(faces[:].image))):
        assert torch.equal(a, b)
    assert seen[:].mask.dtype == torch.int64 and torch.equal(seen[3].mask, seen[[3]].mask[0])
    fine = parse(faces, eye, larger); want = resize(eye(larger[:].image), 32).argmax(1)
    assert torch.equal(fine[:].mask, want) and fine.size == 32 and torch.equal(fine[:].image, faces[:].image)


def test_parts_of_parsed_faces_keep_their_own_masks(bare, eye):
    seen = parse(bare[0], eye); part = seen.subset([7, 2, 5]); again = part.subset([1])
    assert torch.equal(part[:].mask, seen[[7, 2, 5]].mask) and torch.equal(again[0].mask, seen[2].mask) and again.ids == [seen.ids[2]]
    worker = pickle.loads(pickle.dumps(part)) # what a loader's worker gets
    for f in (part, worker): assert torch.equal(f[:].mask, seen[[7, 2, 5]].mask) and f.ids == part.ids
    assert worker.meta['key'] == seen.meta['key'] == part.meta['key']


def test_a_cache_can_tell_who_parsed(bare, eye):
    seed_all(4); other = Parser(size=32, width=16).eval()
    keys = [f.meta['key'] for f in (bare[0], parse(bare[0], eye), parse(bare[0], other))]
    assert len(set(keys)) == 3 and parse(bare[0], eye).meta['key'] == keys[1]


def test_larger_faces_must_be_the_same_faces(bare, eye):
    with pytest.raises(ValueError, match='the larger faces are others, or in another order: pack both from the same folder'):
        parse(bare[0], eye, bare[1].subset([1, 0, *range(2, 9)]))


def test_swapped_sides_are_mended_and_the_others_left_alone(tmp_path):
    "Whoever has left and right the wrong way round gets the names changed, and not one pixel moves"
    faces = load_faces(prepare(write_toyfaces(tmp_path/'raw', 12, size=64), tmp_path/'packed', size=64))
    right, swap = faces[:].mask, torch.arange(len(PARTS))
    for l, r in TWINS: swap[[PARTS.index(l), PARTS.index(r)]] = torch.tensor([PARTS.index(r), PARTS.index(l)])
    bad = torch.arange(12) % 3 == 0
    mixed = Masked(faces.folder, faces.rows, torch.where(bad[:, None, None], swap[right], right).to(torch.int8).numpy(), 'swapped')
    whole, n = mend_sides(faces); mended, m = mend_sides(mixed)
    seen = (right == PARTS.index('l_eye')).any(2).any(1) & (right == PARTS.index('r_eye')).any(2).any(1) # eyes that can be compared
    assert n == 0 and torch.equal(whole[:].mask, right) and m == int((bad & seen).sum()) > 0
    ok = seen | ~bad; assert torch.equal(mended[:].mask[ok], right[ok]) and torch.equal(mended[:].image, faces[:].image)
