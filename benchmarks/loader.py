"""How much faster are packed faces than photos and part files?  python benchmarks/loader.py

One core, one run. The files are decoded at their full 512 px (photo plus up to 18 part images merged into a label
map, nothing resized). Packed faces are read in random order in batches of 32, from a set that is repeated until it
is larger than a processor's cache, and what is read is compared with what was decoded. The goal is held against the
stored bytes at 512 px; a float `Face` is printed beside it, because it is four to eight times as many bytes to write.
Uses CelebAMask-HQ under FACEGEN_FACES where that is set, else toy faces of 512 px.
"""
import os
os.environ['OMP_NUM_THREADS'] = '1'
import shutil, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import numpy as np
import torch
from PIL import Image

from facegen.data.faces import Faces, load_faces, prepare
from facegen.data.layouts import read_raw
from facegen.data.pictures import decode, merge_parts, part_pixels
from facegen.synthetic.toyfaces import write_toyfaces

GOAL, SECONDS, BATCH, BYTES = 150, 4, 32, 512*2**20


def rate(read, n: int) -> float:
    "Faces a second of `read(i)`, which reads one batch and tells its size; the first call is not counted"
    rng = np.random.default_rng(0)
    read(rng.integers(0, n, BATCH))
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        done += read(rng.integers(0, n, BATCH))
    return done/(time.perf_counter() - start)


def faces_at_512(tmp: Path) -> Path:
    "Real faces if there are any here, else toy faces"
    real = os.environ.get('FACEGEN_FACES', '')
    if real: return Path(real)/'CelebAMask-HQ'
    return write_toyfaces(tmp/'toyfaces', 64, size=512)


def decode_all(src: Path):
    "A reader of photos and part files, as a loader without packing needs it"
    listing = read_raw(src)
    raws = listing.raws
    if listing.problems:
        sys.exit(f'{src} has problems: {listing.problems[0]}')
    def one(raw):
        image = np.asarray(Image.open(src/raw.image).convert('RGB'))
        parts = {c: part_pixels(Image.open(src/f)) for c, f in raw.masks.items()}
        return image, merge_parts(parts)
    def read(rows): return len([one(raws[i]) for i in rows])
    return read, len(raws), sum(len(r.masks) for r in raws)/len(raws)


def large(src: Path, tmp: Path, size: int) -> Faces:
    "Pack `src`, check the bytes, and repeat the faces until they fill BYTES"
    once = prepare(src, tmp/f'packed{size}', size)
    for i, raw in list(enumerate(read_raw(src).raws))[::16]:
        image, mask = load_faces(once).uint8([i])
        want = decode(src, raw, size, [])
        if not (np.array_equal(image[0], want[0]) and np.array_equal(mask[0], want[1])):
            sys.exit(f'face {raw.id} was packed wrongly')
    datasets.disable_progress_bars()
    rows = datasets.load_from_disk(str(once))
    datasets.concatenate_datasets([rows]*(1 + BYTES//(len(rows)*4*size**2))).save_to_disk(tmp/f'large{size}')
    shutil.copy(once/'faces.json', tmp/f'large{size}')
    return load_faces(tmp/f'large{size}')


if __name__ == '__main__':
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        src = faces_at_512(Path(tmp))
        read, n, parts = decode_all(src)
        base = rate(read, n)
        print(f'{src.name}: {n} faces, one core, batches of {BATCH} in random order')
        print(f'{f"decode photo + {parts:.1f} part files, 512 px":44}{base:10.0f} faces/s')
        ratio = {}
        for size in (512, 256, 128, 64):
            faces = large(src, Path(tmp), size)
            def stored(rows): return len(faces.uint8(rows)[0])
            def floats(rows): return len(faces[rows].image)
            for what, read in (('stored bytes', stored), ('Face, float', floats)):
                speed = rate(read, len(faces))
                ratio[size, what] = speed/base
                print(f'{f"packed {size} px, {what}":44}{speed:10.0f} faces/s{speed/base:10.0f} x')
        print(f"stored bytes at 512 px: {ratio[512, 'stored bytes']:.0f} times the rate of decoding (goal: {GOAL}); "
              f"as float Face: {ratio[512, 'Face, float']:.0f} times")
        sys.exit(ratio[512, 'stored bytes'] < GOAL)
