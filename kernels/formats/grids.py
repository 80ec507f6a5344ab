"""IQ1, IQ2 and IQ3 of ggml (`ggml-quants.c`, `dequantize_row_iq*`): blocks of 256 values, in groups that are rows of a codebook.

A value is d * (2 s + 1) / STEPS * LEVELS[code]: d is a half of the block, s a scale of 16 or 32 values, and the code of a value what its
group's row of the codebook has there, and a bit above that for its sign (of IQ1: for which side of it the value lies on).
"""

from __future__ import annotations

import base64
import zlib
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ..backend import F32

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]


def _codebook(width: int, group: int, text: str) -> U8:
    """[entries, group] of codes of `width` bits. The entries as numbers, the first code lowest, ascend; kept are their differences."""
    entries = np.cumsum(np.frombuffer(zlib.decompress(base64.b85decode(text)), "<u2").astype(np.int64))
    return (entries[:, None] >> width * np.arange(group) & (1 << width) - 1).astype(np.uint8)


#: ggml-common.h's iq1s_grid, iq2xxs_grid, iq2xs_grid, iq2s_grid, iq3xxs_grid and iq3s_grid.
CODEBOOKS = {
    name: _codebook(*of)
    for name, of in {
    "IQ1": (2, 8,
        "c-oCujc(&M3>IZ6c4}XLuysxoU(*5|+U*W|o!*)NJz$6K)~(nx?9InN(UP6)h9ZqEQ55-+{Kz=xU4?(%)h@UezZdw~xQ^G(@JUu$+k0}LyA?jQZg3HwmiURNgVw!!Z"
        "|8Tj^Q61Mx9ECZp_>E#m$%<RP7Wy5q0|Z9@{ynSd?VnVNc6ZH@eJsC#X7{B-kqaP@hk2AiP8`F-KkWAt7QAY)<(Sfkgf3`3Oha1qK*M20B@6(2gRm4>U)E-8?$uWeT"
        "k6itoUw0mb5>pbYL8O=B;2qC>DUL361Es?vyoE?#&{)&@=RYf}gELYY%i|tB5vueuMV`$8^L|&JG;!VCdIs=dYFt^O(q5o7o7NWY6~i%jQu9MyJZ+pDc=Qot>%GR<g"
        "XZ^8>EZ`x#1qg~*we@Qc}9-ZJ3=GsUYH0dv`#*P}g=v2FOB_DIub_YTqa?s^iPlw%RKy~I2x1eY=^rn@QAI<_QgtP*Nllw5Fx_k82DiX-n0v%MXhX_jt_sCr(J8_A+"
        "C_)OOIMJ|f$t;OGK<x`AWe(SV;TaLztGwsB^9IP-xJbC_uem`@}$lF`Jx3d_D$E0~TIW>BGpkgnjmha3{vH2JFG%~Nr4dP|WuuAi#&f?!%K1&6OHQ;`;N*d6oirFi="
        "8{ECX+WH>RI-h83HG{k&T${GWeR43XrO3QFzNai7vz}J24&<!Z{K#C}W>FI!PJ9SjIfBs@$_fLEU(e9-N{hKzD>}=fcD&|d;5=Dqeu&JPt*;A)@|saYhI`WZhOzM$c"
        "|!67;TUrsisnNs{G~J3`ki=wUoe$eK|V;VOH`AMzBoaMh|WA7k6M*t%k?B?WYdk-Gof+fJ_DEziCZZ6Q5YtVEEK5qcp}e7i96YmBMV1aw)Af9?ey+mV>I0v^X*aB{D"
        "gg{x>v@~Q1mKabdW2}16d1PpJ`<WBl3jp5-UBgC-F$^kQ_}ce5jr}&bx0%eZ^JNWOsDPPyzWqaxVa735lghEUm7WW<S~aC63J7S@tFVT)9i?!x<BGj7g<^EU4YIw#K"
        "^~n-jkB|9j2^>5z^4QRkPx02Eunt<R>uX_wuqoHr~IPwcZUTVX9uIjG7q;=RT{*eoFkJaKPm`7Y3^&7<cTPr|_~e|n8+!0&*bNYpMgk`41tjeU2gNF)~OHD`Us3R15"
        "tzNOU~42+z2KdHv3Yy;f;Px;=?JzY*aO>6z4J31eF%du!&=b4MWMzlRTE8c7Wo9liBnKIvTZAffB&~$@nEcI0Kf7$~^uFGeXQ=W}STV=ut%8!Bj>Jl;8&-!<7b1!v<"
        "{s0cC^W<}vw>rG#NFJM&N&e@#&e(CpfbEUeAt>uNMHedPyxKA&+KihRddpF+vVOKVzqS*sDxUbg`_6rW)R|~~jZY;HiGI<YI&#DPVmjkC%rNjjyU<D_n=|~vYWh(tf"
        "vR|sF;nX8<ky;KN#ITbP8ewq7n%c6ry9y2s)QSxtDXxi#@Ts&fKk%4*xPR|sjp|8g3b+9;qg1`h_CTjCJ?*L^GkSHto^7+COd9fj^6)Z=>>O;Z%vASL#MyL!t9sD;Q"
        "pE9LOBt1#e60`;LV~D*y~_yNa){j{v`H9hJ=!7?*GI0Go8{0eoE|hkGrq#kd}EZ{R?w{Q3U"),
    "IQ2_XXS": (2, 8,
        "c-l>o%_~G<6vlt=9q$<5%`|34k?SKV7I(u;lA4l4*+^L^!%A!<ikg~|KVnKTNhv9mg%S%=w)R%GQp&<c@!UIC>2}Y#=bYy}=Q-zsLqv~5t!$%wRBt-?j!`Gyt~f@9#"
        "UN)HV4Nf?%DNON89y5jaZ%yA0$h@XFz%yAd~vol!Belxg0Uf{Eu1+_kx}kR@NTPoox=47^VWjt9`#~67W<9yW2<VGGE*Fo;w@0&k*B1}K9`(ZU-bwbVsbc<y_Ww8aV"
        "buP?P1Vtn+%&=nA_I>8^>tYyy_<FQj%A{mBtowsw5}}8Vb_Cqv!?WRCz5o%!{Lo2c}uKK3`0G7i5c!vCO+PIJ(6bvz(c@^3&>n;@kTD{n}_wy^~aQqXr>2xO48({w`"
        "Um*wxMYdFI3X{R@{06U?xsy33JqOq2Pv{%zY?Qg)R`U96jKnv54Y<TX0O5PO=RadI_R`~ssbK5z"),
    "IQ2_XS": (2, 8,
        "c-noE!An$O6vcnv8=k#nm>L<!j4_`kgAv8U!9{H(6H+7>fsG^TI4-n^Bnq5}S>(QT5JHG8T86tI2v@CI)SuwmUCVIc`M!BmGsBDw@6EmU-Fxo2=U(tg=;v|4y%YMcM"
        "+V#ci+XZRwy!UhwwyXjb5@eTAtiay5*=}GpPTejHRpHolrz#5Bh4_o&dPFC->0dWW;V7<E@m=LD6FFMBJL?tRU}|r(TaaQi==V}y0VDKDEcgB8wqvav}akxGQ!-AD~"
        "{w%^3_<+<F>pB-YBcW2}>0H)+ri&LZ`a50*2UQlr_y&awvmhc%-?~Jm87EcPyJg2wC+hNSz<be9aX$=ux!V-+khC?K;owi$R$>{{h?EwBE;mZJs;JPQT2i6uK+#&@@"
        "mkk>aCR7u*bcocf(ED2kP{SL5-W86g!-;|4-?3&keTgaIF<z#Yma!!4oDsWPvc`=;hM7^N8Fx^7|2<e6pLWclm3lv(wj@{MB_EUW%b7Z3@{;uZhxJFT9d)qh?7HQA+"
        "js|j%pxuH9o(cWJ1i1)_sZPL}}wY!{IQ+|p*N-?*rZlR{VPV+~KRE^J+Q{gvTs`<iYZ;?;@WS)KL)Z_Ns%MORic_@8tY?R0D1{e8d3cS>GHfohw;jQcgJzLWC49CYy"
        "3j"),
    "IQ2_S": (2, 8,
        "c-oy+&ubGw6#k}V8Z!(H9=dj8Nc>SnDurM{s)z><Lhx3Qv{G30AQf%NMGB>t2>u7sTh9e=dh;OUPxH&nY%;UEv&OQ_%+A|4-@Ny|9}6sDna>g$W?trMC23*bbo(3LU"
        "PJO3R%mt#ryA6=nA+?$$3cLkh&<PQXpj|Fk%@Xcik5eR8=KxezNU<L*a>WUSFk9T-!}6|lzo(*7e1;)3yEP$&*Z%Tv4s(?^L-U7)VPlU4rP_+?Gm$oyi~2%@yPmqA8"
        "|<Ijdr$A*R80}|HouZ!*N<-xsOc@MHtgw>Eu}jR*ENhZx9mvkg-_Vc(iDZ;^W6iyL)tCpTfF{P@B6Qu3hYlV#Y1zSwf7l^D)Jx@OgfUTh5Yi_`(}sV1t+^YaxqyY}+"
        "-ppi3FijMPhA?DDMDCLaRk#Z~ick*rWIMxzQw`?!Y#VRJQhej|D|!6)}Nk#!YSUnf_~>6BiL#iFOHtRK%ZXd=qr75hh?Srgv&8F#TSZGQ;6(!Y61$&=;l6??IaSkfn"
        "Qmz8>q?>G`u$!l!mkdk$gAzPax+s@J{bwcfRo@z$69Ct%gyN#LTXNk$)!aORR%px)gDsUGW*JsSJKX}Zu4_J|z^zGBpXwOj;F5OKZ@J7_<;U2$acu5{FL>}Fb^mah`"
        "b1{<nAMu*2iCw;()4mI?wkPeG*><EU;s7^U^(l75Z_&jme&G?mQX}D5!CTzHUl`O*2m"),
    "IQ3_XXS": (3, 4,
        "c-l>nT~C8R5JfK_-_RlyslnFP+N2s2qdxnlzBT^;f8&`cA%^TOJ9FmFos~kqn02LqJyot-zg?m!f03W1DrFO$dc>$gi58rRSC=}d(+a}q(BqvNeP|$Rnmu$gYhO;Q3"
        "$*r##a`!pss|K8YI4=om1rDvVsFu{bSAU=r(|Ap-MeNqDU3c@=C_N>n!U!4&Gy3Dqq62+z<#@%L3i_vJ#0L?C^<*(R+DM8#K|Xn2a(`tq<c%|#9BcwU@Ll@xh?72Kw"
        "WDKbtG$@dvcMhzteZXX#zDs*ld}ew3+74i2mZ($i^!+5L=WUsrf<es5d%W-d-TUNdsT#8DFt(@NE6|MD2}Qed!PKX%Cq"),
    "IQ3_S": (3, 4,
        "c-mD{Yfr;440PH&+9q9Bw!y|g0u5<`?-T$3pK-o8(@>SfcKkSBToH$_myV~y*-`cqB|z%UqH==P-~Bwj)Z(cnnXw1NIa(a=dirR#mT87GK=-sH)`*OlnWvXbO|6mpA"
        "`|q&+hD#6q|6K(S)nE7Za#`+|A4b~ReR7F%|8-r?NOr=t0mq??33~04avmSSg80MBUeb-SejX-a&macxyY5>>HYc6Xn{?mhkq!$J1S=!ReiR%(iM%{x@(OiwTZbC@q"
        "1#fY<l$Dsz!8}v5&AP-km4~ShPmQKG1uTH*)ETJHzs7csfS3+2~m>GOA-HMY|=2dQ;!<L~erhHu6+71LsYrXypsf%$<o~g0{o=VeDqP*qhY;6F#jJtajv-MB-L-fjk"
        "7ffbvx67wnZTIG>Qw0a+o^Pe>~wkDM@N>BL-$veqm1Z&aQ~;8G?hR-NSqr$en7XR*mCxGnO9wL{b|JK5lDGkXC3EpolfGtfl#ty~tOzQK3F>Vaer-?Mxp=0-H5Wzb5"
        "RA;Yu7o3(#V`8;tlHppH7>ZAO?_X9|;@&~>@55W"),
    }.items()
}  # fmt: skip


def _levels(*levels: int) -> I8:
    return np.array(levels, np.int8)


class Grid(NamedTuple):
    """A type: its codebook, what codes stand for, and what they are divided by."""

    codebook: U8
    levels: I8
    steps: int


_IQ1 = _levels(-7, 1, 9, 0, -9, -1, 7, 0)
_IQ2 = _levels(8, 25, 43, 0, -8, -25, -43, 0)
_IQ3 = _levels(4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62)
_IQ3_S = _levels(*range(1, 16, 2), *range(-1, -16, -2))

GRIDS = {
    "IQ1_S": Grid(CODEBOOKS["IQ1"], _IQ1, 8), "IQ1_M": Grid(CODEBOOKS["IQ1"], _IQ1, 8), "IQ2_XXS": Grid(CODEBOOKS["IQ2_XXS"], _IQ2, 8),
    "IQ2_XS": Grid(CODEBOOKS["IQ2_XS"], _IQ2, 8), "IQ2_S": Grid(CODEBOOKS["IQ2_S"], _IQ2, 8),
    "IQ3_XXS": Grid(CODEBOOKS["IQ3_XXS"], _IQ3, 4), "IQ3_S": Grid(CODEBOOKS["IQ3_S"], _IQ3_S, 1),
}  # fmt: skip


def _words(raw: U8, kind: str) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(raw).view(kind).astype(np.int64)


def _fields(words: npt.NDArray[np.int64], *shifts: int) -> npt.NDArray[np.int64]:
    """Each word [blocks, n] at several shifts, one after another: [blocks, n * shifts]."""
    return (words[:, :, None] >> np.array(shifts)).reshape(len(words), -1)


def _signs_of_7(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The signs of eight of which seven are kept: an even number is negative."""
    bits = bits & 127
    return bits | (np.bitwise_count(bits).astype(np.int64) & 1) << 7


def half_of_iq1_m(blocks: U8) -> npt.NDArray[np.float16]:
    """[blocks, 1]: the upper four bits of four words of scales."""
    quarters = _words(blocks[:, 48:], "<u2") >> 12 << np.array([0, 4, 8, 12])
    return quarters.sum(1, keepdims=True).astype("<u2").view("<f2")


def put_half_of_iq1_m(blocks: U8, halves: npt.NDArray[np.float16]) -> None:
    quarters = np.ascontiguousarray(halves).view("<u2")[:, None] >> np.array([0, 4, 8, 12], np.uint16) & np.uint16(15)
    blocks[:, 49::2] = blocks[:, 49::2] & 15 | (quarters << np.uint16(4)).astype(np.uint8)


def parts(kind: str, blocks: U8) -> tuple[npt.NDArray[np.float16], U8, U8]:
    """What blocks [blocks, bytes] are made of: d [blocks, 1], odd scales 2 s + 1 [blocks, 8 or 16], codes [blocks, 256]."""
    d = half_of_iq1_m(blocks) if kind == "IQ1_M" else np.ascontiguousarray(blocks[:, :2]).view("<f2")
    match kind:
        case "IQ1_S":
            words = _words(blocks[:, 34:], "<u2")
            index = blocks[:, 2:34] | (_fields(words, 0, 3, 6, 9) & 7) << 8
            signs, scales = np.repeat(words >> 15, 4, 1) * 255, words >> 12 & 7
        case "IQ1_M":
            high = _fields(_words(blocks[:, 32:48], "u1"), 0, 4)
            index = blocks[:, :32] | (high & 7) << 8
            signs, scales = (high >> 3 & 1) * 255, _fields(_words(blocks[:, 48:], "<u2"), 0, 3, 6, 9) & 7
        case "IQ2_XXS":
            pairs = _words(blocks[:, 2:], "<u4").reshape(-1, 8, 2)
            index, words = _fields(pairs[:, :, 0], 0, 8, 16, 24) & 255, pairs[:, :, 1]
            signs, scales = _signs_of_7(_fields(words, 0, 7, 14, 21)), words >> 28
        case "IQ2_XS":
            words = _words(blocks[:, 2:66], "<u2")
            index, signs, scales = words & 511, _signs_of_7(words >> 9), _fields(_words(blocks[:, 66:], "u1"), 0, 4) & 15
        case "IQ2_S":
            index = blocks[:, 2:34] | (_fields(_words(blocks[:, 66:74], "u1"), 0, 2, 4, 6) & 3) << 8
            signs, scales = blocks[:, 34:66], _fields(_words(blocks[:, 74:], "u1"), 0, 4) & 15
        case "IQ3_XXS":
            index, words = blocks[:, 2:66], _words(blocks[:, 66:], "<u4")
            signs, scales = _signs_of_7(_fields(words, 0, 7, 14, 21)), words >> 28
        case _:
            index = blocks[:, 2:66] | (_fields(_words(blocks[:, 66:74], "u1"), *range(8)) & 1) << 8
            signs, scales = blocks[:, 74:106], _fields(_words(blocks[:, 106:], "u1"), 0, 4) & 15
    grid = GRIDS[kind]
    codes = grid.codebook[index].reshape(len(blocks), 256)
    above = np.unpackbits(np.ascontiguousarray(signs, np.uint8), axis=1, bitorder="little")
    return d, (2 * scales + 1).astype(np.uint8), codes | above * np.uint8(len(grid.levels) // 2)


def scaled(kind: str, blocks: U8) -> tuple[F32, I8]:
    """Scales of 16 or 32 values [blocks, groups], and what they scale [blocks, groups, 16 or 32]."""
    d, scales, codes = parts(kind, blocks)
    by = d.astype(np.float32) * (scales.astype(np.float32) / np.float32(GRIDS[kind].steps))
    return cast("F32", by), GRIDS[kind].levels[codes].reshape(*scales.shape, -1)


def values(kind: str, blocks: U8) -> F32:
    """[blocks, 256]; exact: the factors have 11, 5 and 6 bits."""
    scales, levels = scaled(kind, blocks)
    return cast("F32", (scales[:, :, None] * levels.astype(np.float32)).reshape(len(blocks), 256))


def sixteens(kind: str, blocks: U8) -> tuple[npt.NDArray[np.float16], I8, I8]:
    """IQ1 and IQ3 as d [blocks, 1], scales of 16 values [blocks, 16], and quants [blocks, 256] from -31 to 31."""
    d, scales, codes = parts(kind, blocks)
    grid = GRIDS[kind]
    levels, steps = (grid.levels // 2, grid.steps // 2) if kind == "IQ3_XXS" else (grid.levels, grid.steps)
    scales = np.repeat(scales.view(np.int8), 16 // scales.shape[1], axis=1)
    return (d.astype(np.float32) / np.float32(steps)).astype(np.float16), scales, levels[codes]
