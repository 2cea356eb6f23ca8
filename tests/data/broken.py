"""A source whose file breaks. Worker processes import this, so it imports nothing heavy."""

from data_modules.sources import TextSource, Unit


class BreaksAfter(TextSource):
    """One unit whose tenth row is missing for good."""

    def units(self, split, at_least):
        return [Unit("broken.parquet")]

    def rows(self, unit, start):
        yield from ["a few words of text " * 9] * 9
        raise PermissionError("no access")

    def fingerprint(self):
        return "broken"
