"""`plan`: the tables of a forecast."""

import math

from gemma_scope_jax.display import tables
from gemma_scope_jax.runtime import devices
from gemma_scope_jax.training.forecast import Forecast


def show(found: Forecast, dollars_per_chip_hour: float | None = None) -> bool:
    """Prints a forecast as tables and returns whether the run fits."""
    padded = f" (padded to {found.padded})" if found.padded > found.saes else ""
    title = (
        f"{found.topology}: {found.devices} devices, mesh {found.data} × {found.latent}, "
        f"SAEs: {found.saes}{padded}"
    )
    table = tables.Table("memory on each device", title=title)
    table.add_column("GB", justify="right")
    for need in found.needs:
        table.add_row(need.what, f"{need.bytes / 1e9:.2f}")
    table.add_row("peak, from the compiler", f"{found.peak_bytes / 1e9:.2f}")
    table.add_row("available", f"{found.memory / 1e9:.0f}")
    tables.show(table)
    table = tables.Table("collectives in a step", "part")
    for heading in ("times", "GB on each device"):
        table.add_column(heading, justify="right")
    for c in found.collectives:
        table.add_row(c.kind, c.where, str(c.times), f"{c.bytes / 1e9:.3f}")
    tables.show(table)
    table = tables.Table("time of a step at peak rates")
    for heading in ("TFLOP", "ms"):
        table.add_column(heading, justify="right")
    rows = (
        ("Gemma", f"{found.gemma_flops / 1e12:.1f}", found.gemma_s),
        ("SAEs' matrix products", f"{found.banks_flops / 1e12:.1f}", found.banks_s),
        ("SAEs' optimizer (memory traffic)", "", found.optimizer_s),
        ("collectives (over one link)", "", found.collectives_s),
        ("total, without overlap", f"{(found.gemma_flops + found.banks_flops) / 1e12:.1f}", found.step_s),
    )
    for what, flops, seconds in rows:
        table.add_row(what, flops, f"{1000 * seconds:.1f}")
    tables.show(table)
    table = tables.Table("precision of the SAEs' products")
    price = () if dollars_per_chip_hour is None else ("dollars",)
    for heading in ("passes", "ms per step", "hours", *price):
        table.add_column(heading, justify="right")
    for precision, passes in devices.PASSES.items():
        one = found.at(precision)
        name = f"{precision} (this run)" if math.isclose(one.banks_s, found.banks_s) else precision
        cost = [f"{dollars_per_chip_hour * one.chips * one.hours:,.2f}"] if price else []
        table.add_row(name, str(passes), f"{1000 * one.step_s:.1f}", f"{one.hours:.2f}", *cost)
    tables.show(table)
    units = (("hours", 1), ("minutes", 60), ("seconds", 3600))
    unit, factor = next((one for one in units if one[1] * found.hours >= 1), units[-1])
    print(
        f"At {found.tokens_per_step:,} tokens per step and {found.tokens_per_second:,.0f} tokens per second, "
        f"{found.tokens:,} tokens take {factor * found.hours:.1f} {unit}. At half of the peak rates they take "
        f"{2 * factor * found.hours:.1f} {unit}."
    )
    chip_hours = found.chips * found.hours
    cost = f"That is {chip_hours:,.1f} to {2 * chip_hours:,.1f} chip-hours"
    if dollars_per_chip_hour is None:
        print(f"{cost}. With --dollars-per-chip-hour the price is printed too.")
    else:
        low = dollars_per_chip_hour * chip_hours
        print(f"{cost}, ${low:,.2f} to ${2 * low:,.2f} at ${dollars_per_chip_hour:g} per chip-hour.")
    if found.peak_bytes > found.memory:
        largest = max(found.needs, key=lambda need: need.bytes)
        print(f"The run does not fit in memory. The largest part is {largest.what}: {largest.remedy}.")
    return found.peak_bytes <= found.memory
