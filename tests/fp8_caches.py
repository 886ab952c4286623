"""Caches in fp8 for the tests: every way to give scales, with what the cache stands for written out in fp64."""

import torch

E4M3 = torch.float8_e4m3fn
CONTIGUOUS, PAGED = ("()", "heads", "sequences"), ("()", "heads", "pages", "keys by page")
LAYOUTS = [(shape, 0) for shape in CONTIGUOUS] + [(shape, page) for page in (4, 16) for shape in PAGED]
"""How scales are given, and positions of a page (0: no pages)."""


def stored(*shape, generator=None):
    """Every finite number of e4m3 as likely as another, the largest ones apart."""
    bits = torch.randint(0, 256, shape, generator=generator, dtype=torch.int32)
    return torch.where(bits & 0x7F > 0x50, bits & 0xAF, bits).to(torch.uint8).view(E4M3)


def draw(batch, heads, room, width, value_width, shape, page=0, generator=None):
    """Key and value cache, contiguous or in shuffled pages, their scales, the table, and both ``(B, Hkv, S, D)`` in fp64."""
    blocks = room // page if page else 0
    caches, scales, exact, table = [], [], [], None
    order = torch.randperm(batch * blocks, generator=generator) if page else None
    for which, size in enumerate((width, value_width)):
        x = stored(batch, heads, room, size, generator=generator)
        sizes = {"()": (), "heads": (heads,), "sequences": (batch, heads), "pages": (batch * blocks, heads)}
        kind = ("pages", "heads")[which] if shape == "keys by page" else shape
        scale = 2.0 ** torch.randint(-3, 2, sizes[kind], generator=generator).float() * (1.3 if which else 1.0) / 4
        wide = x.double()
        if page:
            table = order.view(batch, blocks).int()
            pool = torch.zeros(batch * blocks, page, heads, size, dtype=torch.uint8)
            for b in range(batch):
                for i in range(blocks):
                    part = slice(i * page, (i + 1) * page)
                    pool[order[b * blocks + i]] = x.view(torch.uint8)[b, :, part].transpose(0, 1)
                    of_page = scale[order[b * blocks + i]] if kind == "pages" else scale
                    wide[b, :, part] *= of_page.double().expand(heads)[:, None, None]
            x = pool.view(E4M3)
        else:
            wide = wide * scale.double().expand(batch, heads)[:, :, None, None]
        caches.append(x)
        scales.append(scale)
        exact.append(wide)
    return caches, {"key_scale": scales[0], "value_scale": scales[1]}, table, exact
