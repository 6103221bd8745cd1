"""The guess at languages, on sentences whose language is known, and on texts in which there is nothing to guess."""

from __future__ import annotations

import pytest

from luthier.data.audit.languages import UNKNOWN, languages

SENTENCES = {
    "en": "The cat sits on the roof and watches the birds. Tomorrow it will rain, says the forecast.",
    "de": "Die Katze sitzt auf dem Dach und schaut den Vögeln zu. Morgen wird es regnen.",
    "fr": "Le chat est assis sur le toit et regarde les oiseaux. Il pleuvra demain, dit la météo.",
    "es": "El gato está sentado en el tejado y mira a los pájaros. Mañana lloverá.",
    "ru": "Кот сидит на крыше и смотрит на птиц. Завтра будет дождь, говорит прогноз погоды.",
    "zh": "猫坐在屋顶上看着鸟儿。天气预报说明天会下雨。我们应该带上雨伞再出门。",
    "ja": "猫は屋根の上に座って鳥を見ています。天気予報によると明日は雨です。",
    "ar": "القطة تجلس على السطح وتنظر إلى الطيور. غدا سوف تمطر كما تقول النشرة الجوية.",
    "hi": "बिल्ली छत पर बैठी है और पक्षियों को देख रही है। कल बारिश होगी।",
}


@pytest.mark.parametrize(("language", "sentence"), SENTENCES.items())
def test_knows_a_sentence(language: str, sentence: str) -> None:
    assert languages([sentence]) == {language: 1}


@pytest.mark.parametrize("text", ["", "42", "Paris", "Yes.", "x = 3 * (y + 2)", "!!!"])
def test_does_not_guess_where_there_is_nothing_to_guess(text: str) -> None:
    assert languages([text]) == {UNKNOWN: 1}


def test_most_frequent_first_and_unknown_last() -> None:
    found = languages(["", "", "", SENTENCES["de"], SENTENCES["en"], SENTENCES["en"]])
    assert list(found.items()) == [("en", 2), ("de", 1), (UNKNOWN, 3)]
