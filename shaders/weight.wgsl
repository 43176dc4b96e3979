// Frozen weights in any format. A part, not a family: what is concatenated with it declares the buffer `w: array<u32>` and a
// function `weight_layout()`. Rows count from the layout's first row; a quad is four neighbouring columns from a multiple of 4
// on, an octet eight from a multiple of 8 on, both zero past the end of a row.
//
// f32: a value a word. f16: two halves a word over the whole matrix. q8 and q4 have groups of 32 columns, the last of a row
// padded with zero codes: first the codes of all rows, 8 or 4 words a group, then the scales, q8's one half a group, q4's a half
// scale and a half minimum a group. A q8 value is scale * code, a q4 value scale * code + minimum.

const W_FORMAT: u32 = 1u;       // 0 f32, 1 f16, 2 q8, 3 q4
const W_ALIGNED: bool = false;  // rows are multiples of 4 long

struct WeightLayout {
    first_row: u32,
    columns: u32,    // values of a row
    scales_at: u32,  // word at which the scales begin
}

fn weight_group(stored: WeightLayout, row: u32, column: u32) -> u32 {
    return (stored.first_row + row) * ((stored.columns + 31u) / 32u) + column / 32u;
}

fn weight_q8_scale(stored: WeightLayout, group: u32) -> f32 {
    let pair = unpack2x16float(w[stored.scales_at + group / 2u]);
    return select(pair.x, pair.y, (group & 1u) == 1u);
}

fn weight_at(row: u32, column: u32) -> f32 {
    let stored = weight_layout();
    if W_FORMAT == 0u {
        return bitcast<f32>(w[(stored.first_row + row) * stored.columns + column]);
    }
    if W_FORMAT == 1u {
        let element = (stored.first_row + row) * stored.columns + column;
        let pair = unpack2x16float(w[element / 2u]);
        return select(pair.x, pair.y, (element & 1u) == 1u);
    }
    let group = weight_group(stored, row, column);
    let place = column % 32u;
    if W_FORMAT == 2u {
        let code = extractBits(bitcast<i32>(w[group * 8u + place / 4u]), 8u * (place % 4u), 8u);
        return weight_q8_scale(stored, group) * f32(code);
    }
    let code = extractBits(w[group * 4u + place / 8u], 4u * (place % 8u), 4u);
    let scales = unpack2x16float(w[stored.scales_at + group]);
    return fma(scales.x, f32(code), scales.y);
}

fn weight_or_zero(row: u32, column: u32) -> f32 {
    if column >= weight_layout().columns {
        return 0.0;
    }
    return weight_at(row, column);
}

fn q8_codes(word: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(vec4(word) << vec4(24u, 16u, 8u, 0u)) >> vec4(24u));
}

fn q4_codes(bits: u32) -> vec4<f32> {
    return vec4<f32>((vec4(bits) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u));
}

// A padding code of q4 stands for the minimum; the other formats' padding is zero.
fn within_row(value: vec4<f32>, column: u32, columns: u32) -> vec4<f32> {
    if W_ALIGNED {
        return value;
    }
    return select(vec4(0.0), value, vec4(column) + vec4(0u, 1u, 2u, 3u) < vec4(columns));
}

fn weight_quad(row: u32, column: u32) -> vec4<f32> {
    let stored = weight_layout();
    if W_FORMAT < 2u && !W_ALIGNED {
        return vec4(
            weight_or_zero(row, column), weight_or_zero(row, column + 1u),
            weight_or_zero(row, column + 2u), weight_or_zero(row, column + 3u),
        );
    }
    if W_FORMAT == 0u {
        let at = (stored.first_row + row) * stored.columns + column;
        return bitcast<vec4<f32>>(vec4(w[at], w[at + 1u], w[at + 2u], w[at + 3u]));
    }
    if W_FORMAT == 1u {
        let at = ((stored.first_row + row) * stored.columns + column) / 2u;
        return vec4(unpack2x16float(w[at]), unpack2x16float(w[at + 1u]));
    }
    let group = weight_group(stored, row, column);
    let place = column % 32u;
    if W_FORMAT == 2u {
        return weight_q8_scale(stored, group) * q8_codes(w[group * 8u + place / 4u]);
    }
    let scales = unpack2x16float(w[stored.scales_at + group]);
    let codes = q4_codes(w[group * 4u + place / 8u] >> (4u * (place % 8u)));
    return within_row(fma(vec4(scales.x), codes, vec4(scales.y)), column, stored.columns);
}

struct Octet {
    low: vec4<f32>,
    high: vec4<f32>,
}

fn weight_octet(row: u32, column: u32) -> Octet {
    let stored = weight_layout();
    if W_FORMAT < 2u {
        // In an aligned row either quad may still lie past the end.
        if W_ALIGNED && column + 4u >= stored.columns {
            return Octet(weight_quad(row, column), vec4(0.0));
        }
        return Octet(weight_quad(row, column), weight_quad(row, column + 4u));
    }
    let group = weight_group(stored, row, column);
    let place = column % 32u;
    if W_FORMAT == 2u {
        let scale = weight_q8_scale(stored, group);
        let at = group * 8u + place / 4u;
        return Octet(scale * q8_codes(w[at]), scale * q8_codes(w[at + 1u]));
    }
    let scales = unpack2x16float(w[stored.scales_at + group]);
    let word = w[group * 4u + place / 8u];
    let low = fma(vec4(scales.x), q4_codes(word), vec4(scales.y));
    let high = fma(vec4(scales.x), q4_codes(word >> 16u), vec4(scales.y));
    let columns = stored.columns;
    if W_ALIGNED {
        return Octet(low, select(high, vec4(0.0), column + 4u >= columns));
    }
    return Octet(within_row(low, column, columns), within_row(high, column + 4u, columns));
}
