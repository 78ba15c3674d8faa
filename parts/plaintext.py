r"""Plain text: an answer with what only looks different folded away, and what only sets type gone.

    >>> plain_text(r"\textcolor{red}{\boldsymbol{1\,000}}\text{ Birr}"), plain_text("**፲፰ ₦**")
    ('1 000 birr', '፲፰')

Digits of every script become ASCII; dashes, spaces and apostrophes become one of each; LaTeX and
Markdown that set a style, currency, degrees and the percent sign are dropped; letters are lower
case. What the text says is not asked here. Functions stand below the patterns they use. A comment
"x -> y" says what becomes of an example.
"""

import re
import unicodedata

# Plain characters, and what is taken for each of them.
_LOOKALIKES = {
    "-": "−–‐‑‒",  # the minus sign, dashes and hyphens
    "'": "’‘ʼ′`٬",  # the last is the Arabic thousands separator
    '"': "“”„«»「」『』",
    "/": "⁄∕",
    ",": "،",
    ";": "፣፤、؛",  # Ethiopic, Chinese and Arabic marks that join the items of a list
    ".": "。።।॥꘎۔٫！",  # full stops, the Arabic decimal separator, and a mark that is no factorial
    ":": "∶",
    "#": "№",
    "(": "【《",
    ")": "】》",
    "?": "؟",
    "%": "٪",
    "°": "º",
    " ": "፡•‣◦✓✔✅☑",  # the Ethiopic word space, and marks of a list or of what is right
    "万": "萬",  # Han numerals in one spelling
    "億": "亿",
    "二": "两兩",
    "〇": "零",
}
_SAME_AS = {
    lookalike: plain for plain, lookalikes in _LOOKALIKES.items() for lookalike in lookalikes
}

# A vowel sign, tone mark or accent, which Python takes for no letter: the last of రూ, or the dot of
# ẹ̀. Scripts up to U+1EFFF have them; what lies above is figures, pictures and Han.
MARK = "[{}]".format(
    "".join(
        chr(code)
        for code in range(0x300, 0x1F000)
        if unicodedata.category(chr(code)) in ("Mn", "Mc")
    )
)

# A fraction in raised and lowered figures: 3¹⁄₂ -> 3 1/2
_RAISED_FRACTION = re.compile(r"(?<![^\W\d_])([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[/⁄∕]([₀-₉]+)")

# A run of raised figures, which are an exponent: 10³ -> 10^{3}
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")

# A run of lowered figures behind a figure, which are a base: 18₁₀ -> 18_{10}. That of x₁ is a name.
_SUBSCRIPTS = re.compile(r"(?<=\d)[₀-₉]+")

# CLDR's short forms of multiples, right behind a figure: 18k -> 18 thousand. That of ₦2,500.00k is
# the kobo of an amount that has none.
_SHORT_FORMS = (
    (re.compile(r"(?<=\.00)[Kk](?!\w)"), " "),
    (re.compile(r"(?<=\d)[Kk](?!\w)"), " thousand "),
    (re.compile(r"(?<=\d)M(?!\w)"), " million "),
    (re.compile(r"(?<=\d)B(?!\w)"), " billion "),
)

# Currencies of one capital letter that are written against their number, and in which a small
# letter would be a variable or an exponent: E18, P18, D18 -> 18
_CAPITAL_CURRENCY = (re.compile(rf"(?<![^\W_])(?<!{MARK})[EPD](?=\d)"), "")

# The ohm, which is a variable as a small letter: 18 Ω -> 18 ohm
_OHM = (re.compile(r"(?<=\d)\s?Ω(?!\w)"), " ohm ")

# Behind a space or in a font, M may be an ill-spelt metre, and G a gram, so these are two words of
# doubt. They are looked for before letters become lower case: 18 M -> 18 mega
_GAP = r"(?<=\d)((?:\s|~|\\[ ,;:]|\\(?:text|math)\w*\s*\{|\{)*)"
_DOUBTFUL_CAPITALS = (
    (re.compile(_GAP + r"M(?!\w)"), r"\1 mega "),
    (re.compile(_GAP + r"G(?!\w)"), r"\1 giga "),
)

# Currencies that are written against their number: R18, KSh500. There is no need to list signs such
# as ₦, which Unicode knows, nor "naira" or "元" after a number, which are words like any other.
_CURRENCY_PREFIX = (
    "(?:[rnkm]|br|rs|tk|k?shs?|[tu]shs?|le|[mz]k|fc?|f?cfa|frw|gh[cs]|"  # what people write
    "usd?|eur|gbp|ngn|etb|kes|tzs|ugx|rwf|zar|zmw|lsl|xaf|xof|jpy|cny|rmb|thb|inr|bdt|chf|"  # ISO
    "birr|naira|cedis?|rand)"
)

# An argument of \frac: {12}, or one figure without braces. It has two groups, and one is filled.
_ARGUMENT = r"\s*(?:\{\s*(-?[\w.,' ]+?)\s*\}|(\d))"

# A unit of a quotient: {m}, {s^2}
_UNIT = r"\s*\{\s*([^\W\d_]{1,9}(?:\s?\^\d)?)\s*\}"

# A letter, or a mark of one.
_PART_OF_WORD = rf"(?:[^\W\d]|{MARK})"
NOT_INSIDE_A_WORD = f"(?<!{_PART_OF_WORD})"
WORD_ENDS = f"(?!{_PART_OF_WORD})"

# A figure of Chinese and Japanese that stands alone, as a part of a fraction: the 三 of 三分之一
_HAN_FIGURES = "[一二三四五六七八九十]"
_PART_IN_HAN = rf"(\d+|(?<!{_HAN_FIGURES}){_HAN_FIGURES}(?!{_HAN_FIGURES}))"


def _as_fraction(match: re.Match[str]) -> str:
    """Return 1/3 for the groups 三 and 一 of 三分之一."""
    bottom, top = (
        str(int(unicodedata.numeric(part))) if len(part) == 1 else part for part in match.groups()
    )
    return f" {top}/{bottom} "


# What makes a bound of a French or Spanish minus, "au moins 18" and "al menos 18", or an "about":
# plus ou moins 18, más o menos 18.
_BOUND_BEFORE = r"(?<!\bau )(?<!\bou )(?<!\bal )(?<!\blo )(?<!\bdo )(?<!\bo )"

# Words that say minus or negative and nothing else beside a number. Those of doubt stand under
# `changes` in scales.json: the Bengali ঋণ, which is also a loan, and the Italian meno, which is
# teeth in Sotho. A word that does not touch a number leaves its dash in the text, so that this is
# no positive number either.
_MINUS_WORDS = "|".join(
    (
        "minus|m[ií]nusz?|miinus|n[eé]gati(?:v(?:e[mnrs]?|[oa]s?)?|fs?)",  # in many languages
        r"(?:moins|menos)(?!\s+(?:de|que)\b)",  # French, Spanish, Portuguese; but not "less than"
        "hasi|negaatiivii|eksi|âm",  # Swahili, Oromo, Turkish, Vietnamese
        r"минус|минусов\w*|отрицательн\w*|мінус|від'ємн\w*",  # Russian, Ukrainian
        "μείον|מינוס|მინუს|մինուս",  # Greek, Hebrew, Georgian, Armenian
        "(?:ال)?سالب|ناقص|منفي|منفی|مائنس",  # Arabic, Persian, Urdu
        "አሉታዊ|ማይነስ|ነጋቲቭ|ኔጋቲቭ|ኔጌቲቭ",  # Amharic
        "মাইনাস|ঋণাত্মক|নেগেটিভ",  # Bengali
        "माइनस|ऋणात्मक|ऋण|नकारात्मक|उणे",  # Hindi, Marathi
        "మైనస్|ఋణాత్మక|రుణాత్మక|నెగటివ్|నెగెటివ్",  # Telugu
        "மைனஸ்|ಮೈನಸ್|ಋಣಾತ್ಮಕ|മൈനസ്|માઇનસ|ਮਾਈਨਸ",  # Tamil, Kannada, Malayalam, Gujarati, Punjabi
        "마이너스|영하|음수",  # Korean
    )
)

# Likewise in scripts that write no spaces between words: Chinese, Japanese, Thai. 〇下 is "below
# zero". 负 alone is a minus before a number only: 负责 is "responsible", and it ends a few words,
# too: 胜负, victory or defeat. ลบ stands inside of a few Thai verbs, and in ลบ.ม., a cubic metre.
_BEFORE_A_NUMBER = r"(?=\s*(?:\.?\d|\(|[〇一二三四五六七八九十百千万億፩-፼]))"
_MINUS_WITHOUT_SPACES = (
    rf"(?:(?<![勝胜自担擔肩背抱欺正])[负負](?:[数的の]|{_BEFORE_A_NUMBER})|〇下|氷点下|マイナス"
    rf"|(?:ติด|ค่า)ลบ|(?<![กตสห])ลบ{_BEFORE_A_NUMBER})\s*"
)

# Patterns and what replaces them. They are applied in this order, since some need what an earlier
# one wrote.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # The end of a line, and half of a LaTeX space, at the end: 18 \\ -> 18
        (r"\\+\s*$", ""),
        # LaTeX that is not seen: 1,\!000 -> 1,000
        (r"\\!|\\(?:left|right)(?![a-z])|\\bigg?[lrm]?(?![a-z])", ""),
        # Spaces with a name or a width: 18\hspace{2mm}birr, 18\thinspace birr -> 18 birr
        (
            r"\\[hm]space\*?\s*\{[^{}]*\}"
            r"|\\(?:(?:thin|med|thick|en)space|enskip|hfill?)(?![a-z])",
            " ",
        ),
        # What lines up equations: \begin{aligned}18\end{aligned} -> 18
        (r"\\(?:begin|end)\s*\{(?:aligned|gathered|split)\}|^\s*&|&\s*(?==|$)", " "),
        # What is struck out is no answer, and what makes a "…" of it is no number: ~~18~~ -> …
        (r"~~(?=\S)[^~]+~~", " … "),
        # LaTeX spaces, and the brackets of a formula: 1\,000 -> 1 000, \(18\) -> 18
        (r"\\[,;: ()\[\]]|\\q?quad(?![a-z])|~", " "),
        # Sizes and fonts that hold until the next brace: \displaystyle 18 -> 18
        (
            r"\\(?:display|text|script)style(?![a-z])|\\(?:large|huge|small|tiny|normalsize)"
            r"(?![a-z])|\\(?:bf|it|rm|sf|tt)(?:series|family|shape)?(?![a-z])",
            " ",
        ),
        # Colours: \textcolor{red}{18} -> {18}, \color{red} 18 -> 18
        (r"\\(?:textcolor|colorbox|color)\s*(?:\[\w*\])?\s*\{[\w!, ]*\}", " "),
        # A number with its unit: \SI{18}{m} -> {18}{m}
        (r"\\(?:si|qty)(?=\s*\{[^{}]*\}\s*\{)", " "),
        # Markdown that sets bold or slanted type: **18** -> 18, but not 2**18**2
        (r"(?<![\w)*])(\*{1,3}|__?)(?=\S)([^*]+?)(?<=\S)\1(?![\w(*{])", r" \2 "),
        # HTML that does so: <b>18</b>, 18<br> -> 18
        (r"<(b|i|u|em|strong)>([^<>]*)</\1>", r" \2 "),
        (r"<br\s?/?>", " "),
        # A comma in braces, which keep TeX from spacing it: 1{,}000 -> 1,000
        (r"\{,\}", ","),
        # The two products: 1.2 \times 10 -> 1.2 × 10
        (r"\\(?:times|cdot)(?![a-z])", "×"),
        # What leads to the last side, like an "=": \approx 18, 6 × 3 \Rightarrow 18 -> 6 × 3 = 18
        (r"\\(?:simeq|sim|(?:long)?rightarrow|implies|therefore)(?![a-z])|[≃⇒→⟶⟹∴]", "="),
        (r"\\approx(?![a-z])", "≈"),
        # A power of ten: 10 ^ {3}, 10**3 -> 10^{3}, 10^3
        (r"\{\s*10\s*\}(?=\s?\^)", "10"),
        (r"(?<![\d.,])10\s?(?:\*\*|\^)\s?(?=[-+\d{])", "10^"),
        # An exponent or a base in braces: 10^{3} -> 10^3, 25_{8} -> 25_8. Before a figure they
        # stay, since 10^{2}5 is not 10^25.
        (r"\^\{\s*([-+]?\d+|\w)\s*\}(?!\d)", r"^\1"),
        (r"(?<=\d)\s?_\s?\{\s*(\d+)\s*\}(?!\d)", r"_\1"),
        # A fraction: \frac{1}{2} -> 1/2. Its spaces keep 1\frac12 apart from 11/2.
        (rf"\\(?:[cdt]?|s|nice)frac{_ARGUMENT}{_ARGUMENT}", r" \1\2/\3\4 "),
        (r"(?:^|\{)\s*(-?\d+)\s*\\over(?![a-z])\s*(\d+)\s*(?:\}|$)", r" \1/\2 "),
        # One of so many parts: 3分の1, 三分之一 -> 1/3. Not 二又三分之一, 2 1/3.
        (
            rf"(?<![又と\s〇百千万億点.,/]){_PART_IN_HAN}分[之の]{_PART_IN_HAN}"
            r"(?![百千万億点.,/半])",
            _as_fraction,
        ),
        # A decimal that only comes near a fraction: 1/3 ≈ 0.33 -> 1/3. Any other leads to the last
        # side: x ≈ 18 -> x = 18
        (r"(\d/\d+)\s*≈\s*\d+[.,]\d+\s*$", r"\1"),
        ("≈", "="),
        # Units as a fraction: \frac{m}{s^2} -> m/s^2
        (rf"\\[cdt]?frac{_UNIT}{_UNIT}", r" \1/\2 "),
        # Figures that repeat: 0.\overline{3}, 0.\dot3 -> 0.(3)
        (r"(?<=\d)([.,]\d*)\s*\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))", r"\1(\2\3)"),
        # Likewise with a line above each of them, or with dots behind: 0.3̅, 0.333... -> 0.(3)
        (r"(?<=\d)([.,]\d*?)(\d)\u0307(\d*)(\d)\u0307", r"\1(\2\3\4)"),
        (rf"(?<=\d)([.,]\d*)((?:\d[\u0304\u0305\u0307])+)(?!{MARK})", r"\1(\2)"),
        (r"(?<=\d)([.,]\d{0,9}?)(\d{1,9}?)\2{2,}\s?\.{3}", r"\1(\2)"),
        (r"(?<=\d)[\u0304\u0305\u0307](?=[\d\u0304\u0305\u0307]*\))", ""),
        # Other marks on a figure, and other figures that go on, make it no clear number.
        (r"(?<=\d)[\u0300-\u036f]+", " … "),
        (r"(\d[.,]\d+)\s?\.{3}", r"\1 …"),
        # The base that is meant anyway: 18_10 -> 18
        (r"(?<=\d)_10(?!\d)", ""),
        # Currencies of LaTeX: \pounds 18 -> $ 18
        (r"\\(?:pounds|euro|yen|textdollar|texteuro|textsterling)(?![a-z])", "$"),
        # An amount in millions, whose m is no metre: $18m -> $18 mega
        (rf"((?:\$|(?<!\w){_CURRENCY_PREFIX})\s?\d[\d.,]*)\s?m(?!\w)", r"\1 mega "),
        (rf"(?<=\d)\s?m(?=\s?\$|\s{_CURRENCY_PREFIX}(?!\w))", " mega "),
        # Currency between a sign and its number: -$18 -> -18
        (r"(?<=[-+])\s*\\?\$\s*", ""),
        # Degrees: 18^\circ, 18°C, 18\degree, 18^{\circ} \text{C} -> 18
        (
            r"(?:\^\s*\{\s*(?:\\circ|°|\\degrees?)\s*[cf]?\s*\}"
            r"|\^?\s*(?:°|\\degrees?(?![a-z]))|\^\s*\\circ(?![a-z]))"
            r"(?:\s*\\(?:text|mathrm)\s*\{\s*[cf]\s*\}|\s?[cf]\b)?",
            " ",
        ),
        # The end of an ordinal: 18^{th}, 18^{\text{o}}, 18\textsuperscript{th} -> 18
        (
            r"(?<=\d)\s?(?:\^|\\textsuperscript)\s*(?:\{\s*(?:st|nd|rd|th|er|[eè]me)\s*\}"
            r"|\{?\s*\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th|er|[eè]me|[aeo])\s*\}\s*\}?)",
            " ",
        ),
        # Currency, percent: 18 $, 18\% -> 18
        (r"\\?[$%]", " "),
        # Percent in words that begin with a hundred, before a number: ร้อยละ 18, 百分之18 -> 18
        (rf"(?:ร้อยละ|百分之){_BEFORE_A_NUMBER}", " "),
        # A number's sign: #18 -> 18
        (r"(?<![^\s(])#\s?(?=\d)", ""),
        # East African "so many shillings": 500/=, 500/- -> 500
        (r"(?<=\d)/[=-](?!\s*\d)", " "),
        # A whole amount, where a dash stands for the cents: 18,- -> 18
        (r"(?<=\d)[.,]\s?--?(?=\s*(?:$|[^\W\d_]))", " "),
        # Currency against its number: KSh500 -> 500. Behind a sign it may have a space: -KSh 500
        (
            rf"(?<![\w)])(?<!{MARK})([-+])\s?(?![a-z]\s){_CURRENCY_PREFIX}\.?\s(?=\d)",
            r"\1",
        ),
        (rf"(?<!\w)(?<!{MARK}){_CURRENCY_PREFIX}(?=\d)", ""),
        # A sign in words: minus 18, 18 минус -> -18, 18 -
        (rf"{NOT_INSIDE_A_WORD}{_BOUND_BEFORE}(?:{_MINUS_WORDS}){WORD_ENDS}\s*", " -"),
        (_MINUS_WITHOUT_SPACES, " -"),
        # Half of the day: 3:30pm, 3:30 p.m. -> 3:30 pm
        (r"(?<=\d)\s?([ap])\.?\s?m(?![^\W\d_])\.?", r" \1m"),
        # A space after a leading sign: - 18 -> -18. The dash of "answer - 18" is no sign.
        (r"((?:^|[:=])\s*[-+])\s+(?=[\d.])", r"\1"),
    )
]

# What may stand between braces: no others, or pairs that hold none or one more: \frac{\sqrt{2}}{2}
_FLAT = r"[^{}]*"
_NESTED = rf"{_FLAT}(?:\{{{_FLAT}(?:\{{{_FLAT}\}}{_FLAT})*\}}{_FLAT})*"

# A pair of braces of which only the content counts.
_WRAPPER = re.compile(
    # Of a style: \text{18}, \fbox{18}, \num{18} -> 18
    r"(?:\\(?:text(?:bf|it|rm|sf|tt|sc|md|up|sl|normal)?|math(?:rm|bf|it|sf|tt|bb|normal)"
    r"|boldsymbol|bm|emph|[fmh]box|u(?:nderline|line)|num|unit|si|ensuremath|operatorname\*?"
    r"|boxed)\s*"
    # Or of no command: {18} -> 18, but \sqrt{18}, x^{18}, 25_{n} and \{18\} keep theirs
    r"|(?<![\w}^\\]))"
    rf"\{{({_NESTED})\}}"
)


def plain_text(answer: str, *, as_text: bool = False, fold: bool = True) -> str:
    """Return the answer with ASCII digits, and one kind of minus, space and apostrophe.

    LaTeX and Markdown that only set type are gone, and so is currency; letters are lower case.
    as_text  True beside a gold answer that is no number: then 3k may be three times k
    fold     False keeps the case of letters, and then not all that sets type is known
    No text raises. (ours)
    """
    if answer.isascii() and answer.isdigit():  # as most golds are, and there is nothing to fold
        return answer
    text = _RAISED_FRACTION.sub(lambda run: f" {unicodedata.normalize('NFKC', run[0])} ", answer)
    text = _SUPERSCRIPTS.sub(lambda run: f"^{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    text = _SUBSCRIPTS.sub(lambda run: f"_{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    text = "".join(_plain_character(character) for character in text)
    capitals = () if as_text else (*_SHORT_FORMS, _CAPITAL_CURRENCY)
    for pattern, replacement in (*capitals, *_DOUBTFUL_CAPITALS, _OHM):
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFC", text.casefold() if fold else text)
    while True:
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text, unwrapped = _WRAPPER.subn(r" \1 ", text)
        if not unwrapped:  # else a rewrite, or the next pair of braces, may have become possible
            return " ".join(text.split())


def _plain_character(character: str) -> str:
    """Return the plain spelling of one character, "" for what cannot be seen: a direction mark."""
    category = unicodedata.category(character)
    if character.isspace():
        return " "
    if category in ("Cc", "Cf", "Cs"):  # control, format, half of a surrogate pair
        return ""
    if category == "Nd":  # a decimal digit of any script
        return str(unicodedata.decimal(character))
    if category == "Sc":  # a currency sign
        return "$"
    folded = unicodedata.normalize("NFKC", _SAME_AS.get(character, character))
    if category == "No":  # another number
        # A vulgar fraction gets spaces, since 3½ is not 31/2. Others (², ①, ፲) stay as they are:
        # NFKC makes "11" of "1①".
        return f" {folded.replace('⁄', '/')} " if "⁄" in folded else character
    return "".join(_SAME_AS.get(part, part) for part in folded)
