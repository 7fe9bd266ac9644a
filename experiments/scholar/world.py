"""Facts about the world of maps, calendars and numbers."""

import calendar
import random
import zoneinfo
from collections.abc import Iterator
from pathlib import Path

from scholar.facts import Fact

# Places -----------------------------------------------------------------------------------------------------------

REGIONS = ("Africa", "America", "Antarctica", "Asia", "Atlantic", "Australia", "Europe", "Indian", "Pacific")
# Their country is contested, and a quiz is no place to settle it.
CONTESTED = {"Simferopol", "Jerusalem", "Gaza", "Hebron", "El Aaiun", "Taipei", "Stanley", "Hong Kong", "Macau"}


def _tables() -> tuple[dict[str, str], dict[str, str]]:
    """Time-zone database: zone name -> country code, country code -> country name."""
    folder = next(Path(path) for path in zoneinfo.TZPATH if (Path(path) / "zone.tab").is_file())

    def rows(name: str) -> list[list[str]]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        return [line.split("\t") for line in lines if not line.startswith("#")]

    return {row[2]: row[0] for row in rows("zone.tab")}, {row[0]: row[1] for row in rows("iso3166.tab")}


def places() -> Iterator[Fact]:
    country_of_zone, countries = _tables()
    zones = [zone for zone in zoneinfo.available_timezones() if zone.split("/")[0] in REGIONS]
    regions: dict[str, set[str]] = {}
    for zone in zones:
        region, _, city = zone.partition("/")
        regions.setdefault(city.replace("_", " "), set()).add(region)
    for place, where in sorted(regions.items()):
        region = min(where)
        zone = f"{region}/{place.replace(' ', '_')}"
        listed = zone in country_of_zone  # zone.tab leaves out old spellings such as Calcutta
        within = any(other.startswith(f"{place} ") for other in regions)  # Dawson, beside Dawson Creek
        if len(where) > 1 or not listed or within or not place.replace(" ", "").isalpha():
            continue
        country = countries.get(country_of_zone[zone], "")
        telling = country != region and place not in country and country not in place
        plain = country.replace(" ", "").isalpha() and telling and place not in CONTESTED
        yield Fact("region", place, region, f"place {place}", country if plain else "")
        if plain:
            yield Fact("country", place, country, f"place {place}", region)


def country_codes() -> Iterator[Fact]:
    for code, country in sorted(_tables()[1].items()):
        if country.replace(" ", "").isalpha():
            yield Fact("country_code", code, country, f"country code {code}")


# Numbers and dates ------------------------------------------------------------------------------------------------


def roman(number: int) -> str:
    """Roman numeral of 1 to 3,999."""
    tens = (("I", "V", "X"), ("X", "L", "C"), ("C", "D", "M"), ("M", "", ""))
    digits = []
    for place, digit in enumerate(reversed(str(number))):
        one, five, ten = tens[place]
        pattern = ("", "1", "11", "111", "15", "5", "51", "511", "5111", "1t")[int(digit)]
        digits.append(pattern.replace("1", one).replace("5", five).replace("t", ten))
    return "".join(reversed(digits))


def roman_numerals() -> Iterator[Fact]:
    for number in sorted(random.Random("roman").sample(range(1, 400), 200)):
        yield Fact("roman", str(number), roman(number), f"roman {number}", "even" if number % 2 == 0 else "odd")


def hexadecimals() -> Iterator[Fact]:
    for number in sorted(random.Random("hexadecimal").sample(range(10, 256), 100)):
        yield Fact("hex", str(number), f"0x{number:x}", f"hex {number}", "even" if number % 2 == 0 else "odd")


def days_of_year() -> Iterator[Fact]:
    """Number of a day in a common year."""
    days = [(month, day) for month in range(1, 13) for day in range(1, calendar.monthrange(2023, month)[1] + 1)]
    for number in sorted(random.Random("days").sample(range(365), 120)):
        month, day = days[number]
        name = calendar.month_name[month]
        yield Fact("day_of_year", f"{day} {name}", str(number + 1), f"day {number}")


def sums() -> Iterator[Fact]:
    """Sums a + b, and differences of other triples (a + b) - a, one group a triple, whatever the order of a and b."""
    pairs = [(a, b) for a in range(2, 50) for b in range(a, 50)]
    chosen = random.Random("sums").sample(pairs, 300)
    for index, (a, b) in enumerate(chosen):
        if index % 2:
            yield Fact("addition", f"{a} and {b}", str(a + b), f"sum {a} {b}")
        else:
            yield Fact("subtraction", f"{a} from {a + b}", str(b), f"sum {a} {b}")


FAMILIES = (places, country_codes, roman_numerals, hexadecimals, days_of_year, sums)
