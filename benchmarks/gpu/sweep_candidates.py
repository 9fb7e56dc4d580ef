"""Candidate launch configurations of a sweep."""

import dataclasses

from amil_fast.kernels.adjust_pool_config import OnChipConfig, PlanLimits, TritonPlan, pick_plan


def variations(config, N, backward):
    """Yields configurations that differ from ``config`` in one parameter: (name, value, configuration)."""

    def changed(parameter, values):
        for value in values:
            if value != getattr(config, parameter):
                yield parameter, value, dataclasses.replace(config, **{parameter: value})

    if isinstance(config, OnChipConfig):
        yield from changed("num_warps", [w for w in (1, 2, 4, 8, 16) if w <= 4 * config.num_warps])
        if not config.dot:
            yield from changed("bags", [b for b in (1, 2, 4, 8, 16) if b <= 4 * config.bags])
        return
    least = 16 if config.dot else 1
    yield from changed("block_n", [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)
                                   if max(config.block_n // 4, least) <= n <= 4 * config.block_n])  # fmt: skip
    yield from changed("num_warps", [4, 8, 16])
    yield from changed("num_stages", [1, 2, 3, 4, 5])
    yield from changed("registers", [80, 128, 168, 255])
    if config.split:
        yield from changed("group", [8, 16, 32, 64])
    rows = [config.chunk_rows * k // 4 for k in (1, 2, 8, 16) if 16 <= config.chunk_rows * k // 4 < N]
    for value in rows:
        yield "chunk_rows", value, dataclasses.replace(config, chunk_rows=value, split=True)


def candidates(packed, B, N, D, itemsize, backward, multiprocessors):
    """Name -> plan: the current choice, plans with one parameter changed, then the other strategies."""
    plan = pick_plan(packed, B, N, D, itemsize, backward, multiprocessors)
    found = {"current": plan}
    if plan.on_chip is not None:
        for parameter, value, config in variations(plan.on_chip, N, backward):
            found[f"on chip {parameter}={value}"] = dataclasses.replace(plan, on_chip=config)
    if plan.chunks is not None:
        for parameter, value, config in variations(plan.chunks, N, backward):
            if config.registers * 32 * config.num_warps <= 65536:  # the register file of a multiprocessor
                found[f"chunks {parameter}={value}"] = dataclasses.replace(plan, chunks=config)
    nowhere = {"on_chip_forward": 0, "on_chip_backward": 0, "dot_most": 0}
    for name, change in {
        "on chip, twice as large": {"on_chip_forward": 128, "on_chip_backward": 32, "dot_most": 65536},
        "nothing on chip": nowhere,
        "one program per bag": {"stream_bags_per_multiprocessor": 0, **nowhere},
        "always split": {"stream_bags_per_multiprocessor": 1 << 30, **nowhere},
        "without tensor cores": {"dot_most": 0, "dot_tiles": (), "dot_tiles_backward": ()},
    }.items():
        limits = dataclasses.replace(PlanLimits(), **change)
        other = pick_plan(packed, B, N, D, itemsize, backward, multiprocessors, limits)
        if other != plan and other not in found.values():
            found[f"strategy: {name}"] = other
    if packed and plan.on_chip is not None and plan.chunks is not None:
        found["strategy: chunks only"] = TritonPlan(None, dataclasses.replace(plan.chunks, min_rows=-1))
    return found


def combined(plan, times, found):
    """Name -> plan: applies the best changes of single parameters cumulatively."""
    gains = []
    for name, seconds in times.items():
        if "=" in name and seconds < 0.99 * times["current"]:
            part, parameter = name.split("=")[0].rsplit(" ", 1)
            gains.append((seconds, "on_chip" if part == "on chip" else "chunks", parameter, found[name]))
    plans, done = {}, set()
    for _, part, parameter, source in sorted(gains, key=lambda gain: gain[0]):
        if (part, parameter) in done:
            continue
        done.add((part, parameter))
        change = {parameter: getattr(getattr(source, part), parameter)}
        if parameter == "chunk_rows":
            change["split"] = source.chunks.split
        plan = dataclasses.replace(plan, **{part: dataclasses.replace(getattr(plan, part), **change)})
        if len(done) > 1:
            plans["combined " + ", ".join(f"{k}={getattr(getattr(plan, p), k)}" for p, k in sorted(done))] = plan
    return plans
