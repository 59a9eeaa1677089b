"""Texts whose repetition is known by construction: 8 disguises of copies, 9 kinds of honest text, in English
and Chinese, from seeded grammars. `cases()` makes them; tests/test_attacks.py and bench/bench_rewards.py use
them."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from text import TOKEN, repetition, repetition_words

VERBATIM = ("block", "far", "shuffled", "marks")  # a copy's characters are those of the original, once folded
DISGUISED = ("numbered", "fifteenth", "synonyms", "names")
HONEST = ("essay", "headings", "refrain", "list", "dialogue", "poem", "reference", "long essay",
          "long reference")


@dataclass(frozen=True)
class Case:
    kind: str
    language: str
    text: str
    share: float  # of the text's words that are a copy of earlier ones; of an honest text 0


WORDS = {  # a slot {x} of a sentence is filled from x; what fills it may have slots
    "en": {
        "name": "Anselm Beatrix Corwin Dalia Edmund Farah Gideon Hester Ines Jasper Katya Leopold "
            "Mirela Nadir Oonagh Priya Quentin Rosalind Stellan Tamsin".split(),
        "noun": "lantern ledger orchard harbour engine letter window quarry bridge violin winter "
            "kettle cellar compass garden chapel river market tower mirror ferry carpet furnace "
            "almanac telescope beehive signal staircase notebook vineyard mill anchor portrait archive "
            "meadow glacier canal library workshop granary lighthouse courtroom theatre hospital "
            "station parcel tapestry barometer plough typewriter cathedral reservoir saddle hammock "
            "chimney rumour treaty inheritance recipe melody drought harvest verdict rehearsal eclipse "
            "apprenticeship expedition curfew bargain tide silence memory theory census pension ballad "
            "umbrella blacksmith widow deputy gardener surgeon tailor pilgrim orphan magistrate "
            "stranger baker cousin lodger sexton audience regiment monastery tunnel cradle wardrobe "
            "trumpet sermon pamphlet avalanche marsh hedge sparrow wolf mule salmon nettle chestnut "
            "copper velvet marble candle thimble padlock bucket scaffold".split(),
        "adj": "ancient quiet broken enormous bright narrow strange famous wealthy angry brave clever "
            "cold careful difficult empty false gentle happy important lazy modern noisy odd poor "
            "quick rare secret tired useful weak wise".split(),
        "did": "repaired described inherited abandoned measured painted borrowed translated defended "
            "buried inspected auctioned admired dismantled insured photographed restored catalogued "
            "smuggled inaugurated sketched polished surveyed guarded ransomed misplaced rebuilt "
            "praised concealed weighed mocked forgave hired recognised imitated feared dyed mortgaged "
            "baptised divided followed exhibited ridiculed emptied".split(),
        "went": "hurried past|waited beside|sang about|argued over|returned to|dreamed of|walked "
            "around|fell asleep near|wrote about|travelled beyond|laughed at|listened for|wandered "
            "through|reported on|lingered behind|sailed towards|quarrelled with|grew up among|paid for|"
            "hid under".split("|"),
        "when": "before the first frost|on the {n}th of {month}|towards evening|without warning|long "
            "after midnight|during the strike|in {year}|as the fog lifted|when the bells stopped|"
            "between two storms|that autumn|early one Thursday|{n} weeks later|while others slept|"
            "before {place} had {a} {noun}|once the roads dried|since {month}|on the way to {place}|"
            "under {a} {adj} moon".split("|"),
        "month": "January February March April May June July August September October November".split(),
        "n": [str(n) for n in range(4, 20)],
        "year": [str(n) for n in range(1788, 1952)],
        "place": [x + y for x in "Harrow Elm Stony Wid North Cul Ash Brack Pen Oster Lud Kirk".split()
                  for y in "mere ford wick combe den haven stow gate fell bourne".split()],
        "how": "reluctantly slowly twice openly secretly alone eagerly badly thoroughly cheerfully "
            "again nevertheless".split(),
        "topic": "grammar taxation botany clockmaking navigation insurance geometry forestry medicine "
            "cartography printing astronomy".split(),
        "a": "the the the a one this that our every no another her his their".split(),
        "thing": "{a} {noun}|{a} {adj} {noun}|{a} {noun} of {place}|{name}'s {noun}|{a} {noun} and {a} "
            "{noun}|{a} {adj} {noun} from {place}|{a} {noun} which {name} {did}|{topic}|what {name} "
            "{did}|{n} {adj} {noun}s|{a} {noun} behind {a} {noun}".split("|"),
        "who": "{name}|{name}|{name} and {name}|{a} {noun}|{a} {adj} {noun}|someone from {place}|they|"
            "she|he|nobody|{name}'s {noun}|people in {place}".split("|"),
        "does": "{did} {thing}|{how} {did} {thing}|{went} {thing}|{did} {thing} {how}|{did} {thing} "
            "and {went} {thing}|had {did} {thing} for {n} years|never {went} {thing}|could have {did} "
            "{thing}|{how} {went} {thing} near {place}|{did} and {did} {thing}".split("|"),
        "body": "{when}, {who} {does}.|{who} {does}.|{who} {does}, though {who} {does}.|{who} {does}; "
            "{who} {does}.|It was {thing} that {who} {did}, not {thing}.|{when} {who} {does}, because "
            "{who} {does}.|\"{who} {does},\" wrote {name}, \"but {who} {does}.\"|If {thing} was {did}, "
            "then {who} {does}.|{thing} cost more than {thing}, and {who} {does}.|What {who} {did} was "
            "{thing}, {adj} as {thing}.|Neither {thing} nor {thing} was {did}.|{who} {does} until "
            "{who} {does}.|Where {thing} had been {did}, {who} {does}.|Why {who} {does}, {name} alone "
            "knew.".split("|"),
    },
    "zh": {
        "name": "周若兰 陈砚秋 林海生 赵明远 孙小满 何念慈 吴长庚 郑月娥 冯子安 韩春晓 许青禾 沈墨 "
            "蒋文博 罗素云 唐一鸣 顾北辰".split(),
        "noun": "灯笼 账本 果园 港口 发动机 书信 窗棂 采石场 石桥 二胡 冬天 水壶 地窖 罗盘 花园 祠堂 "
            "河流 集市 钟楼 铜镜 渡船 地毯 熔炉 历书 望远镜 蜂箱 信号 楼梯 笔记 葡萄架 磨坊 铁锚 画像 "
            "档案 草地 冰川 运河 图书馆 作坊 粮仓 灯塔 法庭 戏院 医院 车站 包裹 织锦 气压计 犁铧 "
            "打字机 教堂 水库 马鞍 吊床 烟囱 谣言 条约 遗产 菜谱 旋律 旱灾 收成 判决 排练 日食 学徒 "
            "考察队 宵禁 交易 潮水 沉默 回忆 学说 户籍 铁匠 寡妇 园丁 裁缝 香客 孤儿 县令 房客 面包师 "
            "更夫 听众 寺院 隧道 摇篮 衣柜 唢呐 经文 传单 雪崩 沼泽 篱笆 麻雀 野狼 骡子 鲑鱼 荨麻 栗子 "
            "红铜 绒布 石碑 蜡烛 顶针 挂锁 水桶".split(),
        "adj": "古老的 安静的 破旧的 巨大的 明亮的 狭窄的 奇怪的 著名的 富裕的 愤怒的 勇敢的 聪明的 "
            "寒冷的 细心的 困难的 空荡的 虚假的 温柔的 快乐的 重要的 懒惰的 现代的 吵闹的 贫穷的 "
            "迅速的 罕见的 秘密的 疲倦的 有用的 软弱的".split(),
        "did": "修好了 描述过 继承了 丢弃了 丈量过 粉刷了 借走了 翻译了 守护着 掩埋了 检查了 拍卖了 "
            "赞美过 拆掉了 投保了 拍摄了 复原了 登记了 偷运了 素描过 擦亮了 勘测了 看守着 赎回了 "
            "弄丢了 重建了 藏起了 称量过 嘲弄过 雇用了 认出了 模仿着 害怕过 "
            "典当了 分掉了 展出了".split(),
        "went": "匆匆走过 守候在 歌唱 争论着 回到了 梦见了 绕过 睡在 写到 远离了 嘲笑着 倾听着 穿过 "
            "报道了 徘徊于 驶向 惦记着 躲进 付清了 撞见".split(),
        "when": "头一场霜降之前 {month}初{n}那天 傍晚时分 毫无征兆地 半夜过后 罢工期间 {year}年 "
            "雾气散去时 钟声停歇以后 两场暴雨之间 同年秋天 周四清晨 {n}个星期之后 趁众人熟睡 "
            "{place}还没有{noun}时 道路晒干以后 自从{month} 去{place}的路上 {adj}月光下".split(),
        "month": "正月 二月 三月 四月 五月 六月 七月 八月 九月 十月 腊月".split(),
        "n": list("三四五六七八九十"),
        "year": [str(n) for n in range(1788, 1952)],
        "place": [x + y for x in "青云白石柳清桐落平长"
                  for y in "溪镇 水桥 家湾 河口 山坳 泉里 沙洲 林渡".split()],
        "how": "勉强 慢慢 再次 公然 悄悄 独自 急切地 糟糕地 彻底 愉快地 徒劳地 依然".split(),
        "topic": "语法学 税务 植物学 钟表业 航海术 保险业 几何学 林学 医术 "
            "制图学 印刷业 天文学".split(),
        "a": "那座 这处 一件 某个 每份 另一种 我们的 她的 他的 谁家的 半截 几只".split(),
        "thing": "{noun} {a}{noun} {adj}{noun} {place}的{noun} {name}的{noun} {noun}与{noun} "
            "{place}那{adj}{noun} {name}{did}的{noun} {topic} {a}{adj}{noun} {noun}后面的{noun} "
            "{n}样{noun}".split(),
        "who": "{name} {name} {name}和{name} {a}{noun} {adj}{noun} {place}来的人 大家 她 他 没有人 "
            "{name}家的{noun} {place}乡民".split(),
        "does": "{did}{thing} {how}{did}{thing} {went}{thing} {did}{thing}又{went}{thing} "
            "{n}年来{did}{thing} 从不曾{went}{thing} 本可{did}{thing} 在{place}{how}{went}{thing} "
            "把{thing}{how}{did} 对{thing}{did}半辈子".split(),
        "body": "{when}，{who}{does}。 {who}{does}。 {who}{does}，尽管{who}{does}。 "
            "{who}{does}；{who}{does}。 {who}{did}的是{thing}，不是{thing}。 "
            "{when}{who}{does}，只因{who}{does}。 “{who}{does}，”{name}写道，“可{who}{does}。” "
            "倘若{thing}有人{did}，那么{who}{does}。 {thing}比{thing}更贵，于是{who}{does}。 "
            "{who}{did}的{thing}，{adj}样子恰似{thing}。 无论{thing}还是{thing}，都没人{did}。 "
            "{who}{does}，直到{who}{does}。 凡是{thing}{did}之处，{who}便{does}。 "
            "{who}为何{does}，唯有{name}晓得。".split(),
    },
}
SYNONYMS = {  # of adjectives, verbs and adverbs: about one word in six
    "en": dict(zip(WORDS["en"]["adj"] + WORDS["en"]["did"] + WORDS["en"]["how"], (
        "antique silent shattered gigantic radiant slim peculiar renowned rich furious courageous "
        "smart chilly cautious tricky vacant untrue mild joyful crucial idle contemporary loud curious "
        "needy swift scarce hidden weary handy feeble sensible mended depicted received deserted "
        "gauged coloured lent rendered protected interred examined sold cherished disassembled covered "
        "pictured renewed listed trafficked opened drew buffed charted watched redeemed lost "
        "reconstructed lauded hid balanced teased pardoned employed knew copied dreaded tinted pledged "
        "christened split trailed showed derided drained grudgingly gradually doubly publicly covertly "
        "singly keenly poorly fully gladly anew still").split())),
    "zh": dict(zip(WORDS["zh"]["adj"] + WORDS["zh"]["did"], (
        "悠久的 寂静的 残破的 庞大的 光亮的 窄小的 古怪的 知名的 阔绰的 恼怒的 英勇的 机灵的 冰凉的 "
        "谨慎的 艰难的 空旷的 虚伪的 柔和的 欢乐的 关键的 懒散的 当代的 喧闹的 清贫的 飞快的 稀有的 "
        "隐秘的 疲惫的 实用的 脆弱的 修复了 讲述过 承接了 抛下了 测量过 刷新了 借去了 译出了 保卫着 "
        "埋葬了 查验了 卖掉了 称颂过 拆除了 担保了 照下了 还原了 记下了 私运了 描画过 磨光了 测绘了 "
        "看护着 换回了 遗失了 再造了 隐藏了 掂量过 取笑过 聘请了 辨认了 学着 畏惧过 抵押了 瓜分了 "
        "陈列了").split())),
}
LONG = {"en": 770, "zh": 430}  # sentences of 12,000 words


def fill(rng: random.Random, language: str, template: str, **given) -> str:
    def word(slot: re.Match) -> str:
        return str(given.get(slot[1]) or rng.choice(WORDS[language][slot[1]]))
    while (text := re.sub(r"\{(\w+)\}", word, template)) != template:
        template = text
    return text[0].upper() + text[1:]


def write(rng: random.Random, language: str, count: int) -> list[str]:
    """So many sentences, no template twice in a row."""
    bodies, previous, out = WORDS[language]["body"], None, []
    for _ in range(count):
        previous = rng.choice([b for b in bodies if b != previous])
        out.append(fill(rng, language, previous))
    return out


def join(language: str, sentences: list[str]) -> str:
    return ("" if language == "zh" else " ").join(sentences)


def paragraphs(language: str, sentences: list[str], size: int = 5) -> list[str]:
    return [join(language, sentences[i:i + size]) for i in range(0, len(sentences), size)]


# ---------------------------------------------------------------------- copies


def marks(rng: random.Random, language: str, text: str) -> str:
    """Other punctuation, case and spaces."""
    if language == "zh":
        return text.replace("，", " 、").replace("。", "！\n").replace("“", "「").replace("”", "」")
    return text.swapcase().replace(", ", " -- ").replace(". ", "!\n\n").replace(" the", "  the")


def fifteenth(rng: random.Random, language: str, text: str) -> str:
    """Every fifteenth word is another; a Chinese word has 2 characters here, and words 1.6 on average."""
    nouns = WORDS[language]["noun"]
    if language == "en":
        return " ".join(rng.choice(nouns) if i % 15 == 7 else word for i, word in enumerate(text.split(" ")))
    return "".join(rng.choice(nouns)[:2] + text[i + 2:i + 24] for i in range(0, len(text), 24))


def swap(table: dict[str, str], text: str) -> str:
    return re.sub("|".join(map(re.escape, table)), lambda found: table[found[0]], text)


def synonyms(rng: random.Random, language: str, text: str) -> str:
    return swap(SYNONYMS[language], text)


def names(rng: random.Random, language: str, text: str) -> str:
    all_names = WORDS[language]["name"]
    return swap(dict(zip(all_names, all_names[7:] + all_names[:7])), text)


def attack(rng: random.Random, language: str, kind: str, count: int, share: float) -> Case:
    """`count` sentences, of which `share` are copies."""
    copied = round(count * share)
    fresh = write(rng, language, count - copied)
    if kind == "numbered":  # one paragraph again and again under new numbers
        size = max(3, copied // 8)
        repeated = (fresh[:size] * copied)[:copied + size]
        parts = [f"{i}. " + part for i, part in enumerate(paragraphs(language, repeated, size), 1)]
        return Case(kind, language, "\n".join(parts + paragraphs(language, fresh[size:])), share)
    assert copied <= len(fresh), "a copy needs an original"
    at = 0 if kind == "far" else len(fresh) - copied
    chosen = fresh[at:at + copied]
    chosen = rng.sample(chosen, copied) if kind == "shuffled" else chosen
    again = "\n".join(paragraphs(language, chosen))
    if change := {"marks": marks, "fifteenth": fifteenth, "synonyms": synonyms, "names": names}.get(kind):
        again = change(rng, language, again)
    return Case(kind, language, "\n".join(paragraphs(language, fresh)) + "\n" + again, share)


# ---------------------------------------------------------------------- honest texts

FORMS = {
    "en": {
        "heading": "Chapter {i}: The {noun}",
        "item": "{i}. The {adj} {noun}: ",
        "refrain": "And still the river runs, and still we wait.",
        "said": "\"{s}\" said {name}.",
        "asked": "\"{s}\" {name} asked, and {how} {did} the {noun}.",
        "line": "{adj} {noun}, who {did} you?|a {noun} for the {noun}, my dear|the {noun} {went} the "
            "{noun}|{how} I {went} a {adj} {noun}|{when} a {noun}|no {noun} is so {adj}".split("|"),
        "chorus": "Turn, old wheel, for the night is long,|turn and carry us home.".split("|"),
        "entry": "### `{noun}_{noun}(size, mode)`\n\n{s}\n\n- `size`: {thing}. Default {i}.\n- `mode`: "
            "`{noun}` or `{topic}`. Where {thing} is {did}, {adj} values are refused.\n\nReturns "
            "{thing}. Raises `ValueError` if {who} {does}.\n",
    },
    "zh": {
        "heading": "第{i}章　{noun}",
        "item": "{i}、{adj}{noun}：",
        "refrain": "江水照旧东流，我们照旧等候。",
        "said": "“{s}”{name}说。",
        "asked": "“{s}”{name}问道，一面{how}{did}{noun}。",
        "line": "{adj}{noun}，是谁{did}你|为了{noun}献上{noun}|{noun}{went}{noun}|"
            "我{how}{went}{adj}{noun}|{when}的{noun}|没有哪座{noun}这般如{adj}".split("|"),
        "chorus": "转吧老水车，长夜漫漫，|转着送我们回家去。".split("|"),
        "entry": "### `{topic}_{noun}(大小, 模式)`\n\n{s}\n\n- `大小`：{thing}，默认为{i}。\n- "
            "`模式`：可取`{noun}`或`{topic}`，凡{thing}{did}之处，{adj}取值不予接受。\n\n返回{thing}；"
            "若{who}{does}则报错。\n",
    },
}


def honest(rng: random.Random, language: str, kind: str, count: int) -> Case:
    """About `count` sentences without a copy, in a form that repeats some words, as such texts do."""
    form_of = kind.rpartition(" ")[2]
    forms, sentences = FORMS[language], write(rng, language, count)
    many = paragraphs(language, sentences)

    def form(name: str, **given) -> str:
        return fill(rng, language, forms[name], **given)

    if form_of == "essay":
        text = "\n\n".join(many)
    elif form_of == "headings":
        text = "\n\n".join(form("heading", i=i) + "\n\n" + p for i, p in enumerate(many, 1))
    elif form_of == "refrain":
        text = "\n\n".join(p + "\n\n" + forms["refrain"] for p in many)
    elif form_of == "list":
        text = "\n".join(form("item", i=i) + s for i, s in enumerate(sentences, 1))
    elif form_of == "dialogue":
        text = "\n".join(form(rng.choice(("said", "asked")), s=s) for s in sentences)
    elif form_of == "poem":
        lines = [fill(rng, language, rng.choice(forms["line"])) for _ in range(2 * count)]
        stanzas = ["\n".join(lines[i:i + 10] + forms["chorus"]) for i in range(0, len(lines), 10)]
        text = "\n\n".join(stanzas)
    else:
        many = paragraphs(language, sentences, 3)
        text = "\n".join(form("entry", s=p, i=rng.randint(1, 99)) for p in many)
    return Case(kind, language, text, 0.0)


def cases(seed: int = 0) -> list[Case]:
    out = []
    for language in WORDS:
        for kind in VERBATIM + DISGUISED:
            rng = random.Random(f"{seed}/{language}/{kind}")
            long = [(LONG[language], 0.3)] if kind in ("far", "shuffled", "names") else []
            out += [attack(rng, language, kind, *size) for size in [(60, 0.2), (60, 0.35), (60, 0.5)] + long]
        for kind in HONEST:
            rng = random.Random(f"{seed}/{language}/{kind}")
            long = LONG[language] // (2 if kind == "long reference" else 1)  # its entries add as much
            out += [honest(rng, language, kind, n) for n in ([long] if "long" in kind else [40, 60, 90])]
    return out


# ---------------------------------------------------------------------- ours and peers


def ngram_share(text: str, n: int) -> float:
    """1 - distinct / all n-grams of words (CJK: characters). With n = 3 and tokens for words it is TRL's
    get_repetition_penalty_reward (TRL 1.16; arXiv 2502.03373, appendix C.2), but for the sign."""
    tokens = TOKEN.findall(text.casefold())
    grams = list(zip(*(tokens[i:] for i in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def either(text: str) -> float:
    """What the reward `format_words` subtracts."""
    return max(repetition(text), repetition_words(text))


MEASURES: dict[str, Callable[[str], float]] = {
    "repetition": repetition, "repetition_words": repetition_words, "either": either,
    "5-gram share": lambda text: ngram_share(text, 5), "TRL's 3-grams": lambda text: ngram_share(text, 3)}


def auc(attacks: np.ndarray, honest: np.ndarray) -> float:
    """The probability that an attack scores above an honest text, ties counted half."""
    return float((attacks[:, None] > honest).mean() + (attacks[:, None] == honest).mean() / 2)


def table(texts: list[Case]) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """For each measure its AUC, its means by kind, and the largest error on verbatim copies; and all scores,
    (measures, cases)."""
    scores = np.array([[measure(case.text) for case in texts] for measure in MEASURES.values()])
    share = np.array([case.share for case in texts])
    kinds = np.array([case.kind for case in texts])
    rows = {}
    for name, got in zip(MEASURES, scores):
        rows[name] = {"auc": auc(got[share > 0], got[share == 0]), "honest": got[share == 0].mean(),
                      "error": abs(got - share)[np.isin(kinds, VERBATIM)].max(),
                      **{kind: got[kinds == kind].mean() for kind in VERBATIM + DISGUISED + HONEST}}
    return {name: {k: round(float(v), 4) for k, v in row.items()} for name, row in rows.items()}, scores
