"""Numbers as people read them."""

from __future__ import annotations

from pipeline.report.reading import Measurement


def number(value: float | None, digits: int = 3) -> str:
    """`value` with a true minus sign, and none before 0; an en dash if there is no value."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """`value` with its sign, "+0.012" or "−0.012"; 0 has none."""
    shown = number(value, digits)
    return f"+{shown}" if value > 0 and shown.strip("0.") else shown


def duration(seconds: float | None) -> str:
    """Seconds for people: "9.4 s", "1 min 38 s", "2 h 5 min"."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def magnitude(value: float | None) -> str:
    """A large count in three digits with an SI prefix: "1.93 M", "45.2 T"."""
    if value is None:
        return "–"
    for prefix in ("", " k", " M", " G", " T", " P", " E"):
        if abs(value) < 999.5 or prefix == " E":
            break
        value /= 1000
    return f"{value:.3g}{prefix}" if abs(value) < 999.5 else f"{value:.0f}{prefix}"


def interval(measurement: Measurement, digits: int, sign: bool = False) -> str:
    """The measurement's interval, "0.94 to 0.98", signed if `sign`; empty if there is none."""
    if measurement.low is None or measurement.high is None:
        return ""
    shown = signed if sign else number
    return f"{shown(measurement.low, digits)} to {shown(measurement.high, digits)}"
