//! Pictures as SVG: stacked bars, a map of owners, lines with bands, a histogram, a heat map.
//!
//! Text and axes are in the colour of the text around, so that a picture is read on light and dark ground alike; series take the
//! colours of Okabe and Ito, which differ for colour-blind eyes too, and lines have markers beside.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::human::plain;

/// Stands for the text's colour until the picture is finished.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_NAME: &str = "#010203";

const BLUE: RGBColor = RGBColor(0x1f, 0x7f, 0xc0);
const SKY: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
const ORANGE: RGBColor = RGBColor(0xe6, 0x9f, 0x00);
const GREEN: RGBColor = RGBColor(0x00, 0x9e, 0x73);
const VERMILLION: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
const PURPLE: RGBColor = RGBColor(0xcc, 0x79, 0xa7);
const GREY: RGBColor = RGBColor(0x8a, 0x8a, 0x8a);

const WIDTH: i32 = 860;
/// The SVG backend divides sizes by 1.24.
const FONT: i32 = 16;
/// Width of a letter, roughly.
const LETTER: i32 = 6;
const LEGEND_LEFT: i32 = 84;
const LEGEND_LINE: i32 = 22;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Pixel = (i32, i32);
type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<Marked, Marked>>;

/// What a picture's parts are coloured as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hue {
    Blue,
    Sky,
    Orange,
    Green,
    Vermillion,
    Purple,
    Grey,
    /// What is no part of the data, like waiting.
    Faint,
}

impl Hue {
    fn color(self) -> RGBAColor {
        match self {
            Hue::Blue => BLUE.mix(1.0),
            Hue::Sky => SKY.mix(1.0),
            Hue::Orange => ORANGE.mix(1.0),
            Hue::Green => GREEN.mix(1.0),
            Hue::Vermillion => VERMILLION.mix(1.0),
            Hue::Purple => PURPLE.mix(1.0),
            Hue::Grey => GREY.mix(1.0),
            Hue::Faint => INK.mix(0.12),
        }
    }
}

/// How a line looks.
#[derive(Clone, Copy, Debug)]
pub struct Stroke {
    pub hue: Hue,
    pub width: u32,
    pub dashed: bool,
    pub marker: Marker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    Dot,
    Ring,
    Triangle,
    Cross,
    None,
}

/// A series of a line chart.
pub struct Line {
    pub name: String,
    pub stroke: Stroke,
    pub points: Vec<Point>,
}

/// A place of a line.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    /// Half the height of the band around.
    pub band: f64,
}

/// An axis of numbers.
#[derive(Clone, Debug)]
pub struct Axis {
    pub label: String,
    /// Numbers are shown divided by this.
    pub scale: f64,
    pub in_proportion: bool,
}

/// One of the parts that every bar is made of.
pub struct Part {
    pub name: String,
    pub hue: Hue,
    /// `[bar]`
    pub values: Vec<f64>,
}

/// What a legend shows beside a name.
#[derive(Clone, Copy)]
enum Mark {
    Box(RGBAColor),
    Line(Stroke),
}

fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

fn text_style(size: i32) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(&INK)
}

/// A picture with a legend above a body of the given height.
fn picture(
    height: i32,
    legend: &[(String, Mark)],
    draw: impl FnOnce(&Area<'_>, &Area<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let places = legend_places(legend);
    let legend_height = places.last().map_or(0, |&(_, y)| y + LEGEND_LINE);
    let mut svg = String::new();
    {
        let size = (WIDTH as u32, (height + legend_height) as u32);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        for ((name, mark), &place) in legend.iter().zip(&places) {
            draw_legend(&root, name, *mark, place)?;
        }
        let (_, body) = root.split_vertically(legend_height);
        draw(&root, &body)?;
        root.present().map_err(drawing)?;
    }
    Ok(svg.replace(INK_NAME, "currentColor"))
}

/// Where each entry begins: one after the other, in as many lines as it takes.
fn legend_places(legend: &[(String, Mark)]) -> Vec<Pixel> {
    let (mut x, mut y) = (LEGEND_LEFT, 4);
    let mut places = Vec::with_capacity(legend.len());
    for (name, _) in legend {
        let width = 44 + LETTER * name.chars().count() as i32;
        if x + width > WIDTH && x > LEGEND_LEFT {
            (x, y) = (LEGEND_LEFT, y + LEGEND_LINE);
        }
        places.push((x, y));
        x += width;
    }
    places
}

fn draw_legend(root: &Area<'_>, name: &str, mark: Mark, (x, y): Pixel) -> anyhow::Result<()> {
    let middle = y + LEGEND_LINE / 2;
    match mark {
        Mark::Box(color) => {
            let corners = [(x, middle - 6), (x + 16, middle + 6)];
            draw_box(root, corners, color)?;
            root.draw(&Rectangle::new(corners, INK.mix(0.35))).map_err(drawing)?;
        }
        Mark::Line(stroke) => {
            draw_path(root, stroke, vec![(x - 6, middle), (x + 20, middle)])?;
            draw_marker(root, stroke, (x + 7, middle))?;
        }
    }
    let style = text_style(FONT).pos(Pos::new(HPos::Left, VPos::Center));
    root.draw(&Text::new(name.to_owned(), (x + 26, middle), style))
        .map_err(drawing)
}

fn draw_box(root: &Area<'_>, corners: [Pixel; 2], color: RGBAColor) -> anyhow::Result<()> {
    root.draw(&Rectangle::new(corners, color.filled())).map_err(drawing)
}

fn draw_path(root: &Area<'_>, stroke: Stroke, points: Vec<Pixel>) -> anyhow::Result<()> {
    let style = stroke.hue.color().stroke_width(stroke.width);
    match stroke.dashed {
        true => root.draw(&DashedPathElement::new(points, 7, 4, style)),
        false => root.draw(&PathElement::new(points, style)),
    }
    .map_err(drawing)
}

fn draw_marker(root: &Area<'_>, stroke: Stroke, at: Pixel) -> anyhow::Result<()> {
    let color = stroke.hue.color();
    match stroke.marker {
        Marker::Dot => root.draw(&Circle::new(at, 4, color.filled())),
        Marker::Ring => root.draw(&Circle::new(at, 5, color.stroke_width(2))),
        Marker::Triangle => root.draw(&TriangleMarker::new(at, 6, color.filled())),
        Marker::Cross => root.draw(&Cross::new(at, 4, color.stroke_width(2))),
        Marker::None => Ok(()),
    }
    .map_err(drawing)
}

/// One side of a chart: its range, what is marked on it, and how.
struct Side<'a> {
    range: (f64, f64),
    ticks: Vec<f64>,
    label: String,
    text: Box<dyn Fn(f64) -> String + 'a>,
    lines: bool,
}

impl<'a> Side<'a> {
    /// Names of equal width, as many as can be read with `room` pixels each.
    fn names(names: &'a [String], label: &str, pixels: i32, room: i32) -> Self {
        let step = ((names.len() as i32 * room) as f64 / f64::from(pixels)).ceil().max(1.0) as usize;
        Self {
            range: (0.0, names.len() as f64),
            ticks: (0..names.len()).step_by(step).map(|index| index as f64 + 0.5).collect(),
            label: label.to_owned(),
            text: Box::new(|place| names.get(place as usize).cloned().unwrap_or_default()),
            lines: false,
        }
    }

    /// Numbers from `low` to `high`, both placed by [`Axis::place`].
    fn numbers(axis: &'a Axis, (low, high): (f64, f64)) -> Self {
        let ticks = match axis.in_proportion {
            true => ticks_in_proportion(low / axis.scale, high / axis.scale),
            false => ticks(low / axis.scale, high / axis.scale),
        };
        Self {
            range: (axis.place(low), axis.place(high)),
            ticks: ticks.into_iter().map(|tick| axis.place(tick * axis.scale)).collect(),
            label: axis.label.clone(),
            text: Box::new(|place| plain(axis.value(place) / axis.scale)),
            lines: true,
        }
    }
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        match self.in_proportion {
            true => value.ln(),
            false => value,
        }
    }

    fn value(&self, place: f64) -> f64 {
        match self.in_proportion {
            true => place.exp(),
            false => place,
        }
    }
}

/// Five or so round numbers.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    if !(rough.is_finite() && rough > 0.0) {
        return vec![low];
    }
    let power = 10.0_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(rough);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|index| index as f64 * step).collect()
}

/// Round numbers in every decade, fewer where there are many decades.
fn ticks_in_proportion(low: f64, high: f64) -> Vec<f64> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let with = |factors: &[f64]| -> Vec<f64> {
        (decades.clone())
            .flat_map(|decade| factors.iter().map(move |factor| factor * 10.0_f64.powi(decade)))
            .filter(|tick| (low * (1.0 - 1e-9)..=high * (1.0 + 1e-9)).contains(tick))
            .collect()
    };
    let choices: [&[f64]; 4] = [
        &[1.0],
        &[1.0, 2.0, 5.0],
        &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0],
        &[
            1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0,
        ],
    ];
    (choices.into_iter().map(with))
        .find(|ticks| ticks.len() >= 4)
        .unwrap_or_else(|| with(choices[3]))
}

/// A range with marks of our choice.
struct Marked {
    range: RangedCoordf64,
    ticks: Vec<f64>,
}

impl Marked {
    fn new(side: &Side<'_>) -> Self {
        Self {
            range: (side.range.0..side.range.1).into(),
            ticks: side.ticks.clone(),
        }
    }
}

impl Ranged for Marked {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.range.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        match hint.bold_points() {
            0 => Vec::new(),
            _ => self.ticks.clone(),
        }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.range()
    }
}

/// Axes on `body`; the chart gives the places of numbers.
fn axes<'a>(body: &Area<'a>, x: &Side<'_>, y: &Side<'_>) -> anyhow::Result<Chart<'a>> {
    let mut chart = ChartBuilder::on(body)
        .margin_top(10)
        .margin_right(18)
        .margin_left(8)
        .margin_bottom(6)
        .x_label_area_size(46)
        .y_label_area_size(74)
        .build_cartesian_2d(Marked::new(x), Marked::new(y))
        .map_err(drawing)?;
    let mut mesh = chart.configure_mesh();
    if !x.lines {
        mesh.disable_x_mesh();
    }
    if !y.lines {
        mesh.disable_y_mesh();
    }
    mesh.max_light_lines(0)
        .bold_line_style(INK.mix(0.15))
        .axis_style(INK.mix(0.6))
        .label_style(text_style(FONT))
        .axis_desc_style(text_style(FONT))
        .x_labels(x.ticks.len())
        .y_labels(y.ticks.len())
        .x_desc(x.label.clone())
        .y_desc(y.label.clone())
        .x_label_formatter(&|place| (x.text)(*place))
        .y_label_formatter(&|place| (y.text)(*place))
        .draw()
        .map_err(drawing)?;
    Ok(chart)
}

fn pixel(chart: &Chart<'_>, x: f64, y: f64) -> Pixel {
    chart.plotting_area().map_coordinate(&(x, y))
}

/// Bars of parts upon each other.
pub fn stacked_bars(names: &[String], label: &str, parts: &[Part], axis: &Axis) -> anyhow::Result<String> {
    let legend: Vec<(String, Mark)> = (parts.iter())
        .map(|part| (part.name.clone(), Mark::Box(part.hue.color())))
        .collect();
    let height = |bar: usize| -> f64 { parts.iter().map(|part| part.values[bar]).sum() };
    let highest = (0..names.len()).map(height).fold(f64::MIN_POSITIVE, f64::max);
    picture(380, &legend, |root, body| {
        let x = Side::names(names, label, WIDTH - 100, 30);
        let y = Side::numbers(axis, (0.0, highest * 1.02));
        let chart = axes(body, &x, &y)?;
        for bar in 0..names.len() {
            let mut below = 0.0;
            for part in parts {
                let above = below + part.values[bar];
                let corners = [
                    pixel(&chart, bar as f64 + 0.14, above),
                    pixel(&chart, bar as f64 + 0.86, below),
                ];
                if corners[0].1 < corners[1].1 {
                    draw_box(root, corners, part.hue.color())?;
                }
                below = above;
            }
        }
        Ok(())
    })
}

/// Who has which subchannel, with how much of `most_w`, the strongest one's.
pub fn owners(owner: &[usize], power_w: &[f64], clients: usize, most: &str) -> anyhow::Result<String> {
    let most_w = power_w.iter().copied().fold(0.0, f64::max);
    let shade = |part: f64| BLUE.mix(0.15 + 0.85 * part);
    let legend: Vec<(String, Mark)> = [("no power", 0.0), ("", 0.25), ("", 0.5), ("", 0.75), (most, 1.0)]
        .map(|(name, part)| (name.to_owned(), Mark::Box(shade(part))))
        .into();
    let row = (320 / clients.max(1) as i32).clamp(4, 30);
    let names: Vec<String> = (0..clients).rev().map(|client| client.to_string()).collect();
    let subchannels: Vec<String> = (0..owner.len()).map(|subchannel| subchannel.to_string()).collect();
    picture(row * clients as i32 + 62, &legend, |root, body| {
        let x = Side::names(&subchannels, "subchannel", WIDTH - 100, 34);
        let y = Side::names(&names, "client", row * clients as i32, 18);
        let chart = axes(body, &x, &y)?;
        let mut between = 1;
        while between < clients {
            let line = [
                pixel(&chart, 0.0, between as f64),
                pixel(&chart, owner.len() as f64, between as f64),
            ];
            root.draw(&PathElement::new(line, INK.mix(0.12))).map_err(drawing)?;
            between += 1;
        }
        for (subchannel, (&client, &power)) in owner.iter().zip(power_w).enumerate() {
            let (left, bottom) = (subchannel as f64, (clients - 1 - client) as f64);
            let corners = [
                pixel(&chart, left + 0.06, bottom + 0.94),
                pixel(&chart, left + 0.94, bottom + 0.06),
            ];
            let part = if most_w > 0.0 { power / most_w } else { 0.0 };
            draw_box(root, corners, shade(part))?;
            root.draw(&Rectangle::new(corners, BLUE.mix(0.6))).map_err(drawing)?;
        }
        Ok(())
    })
}

/// Lines over `x`, each in its band, and a mark at `own`.
pub fn lines(lines: &[Line], x: &Axis, y: &Axis, own: Option<f64>) -> anyhow::Result<String> {
    let legend: Vec<(String, Mark)> = (lines.iter())
        .map(|line| (line.name.clone(), Mark::Line(line.stroke)))
        .collect();
    let points = || lines.iter().flat_map(|line| &line.points);
    let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::NEG_INFINITY, f64::max);
    let across = (
        least(&mut points().map(|point| point.x)),
        most(&mut points().map(|point| point.x)),
    );
    let low = least(&mut points().map(|point| (point.y - point.band).max(0.3 * point.y)));
    let high = most(&mut points().map(|point| point.y + point.band));
    let up = match y.in_proportion {
        true => (low * 0.93, high * 1.07),
        false => (0.0, high * 1.05),
    };
    anyhow::ensure!(
        across.0 < across.1 && up.0.is_finite() && up.1.is_finite(),
        "a line needs two points"
    );
    picture(400, &legend, |root, body| {
        let chart = axes(body, &Side::numbers(x, across), &Side::numbers(y, up))?;
        let at = |across: f64, value: f64| pixel(&chart, x.place(across), y.place(value.clamp(up.0, up.1)));
        if let Some(own) = own.filter(|own| (across.0..=across.1).contains(own)) {
            let stroke = Stroke {
                hue: Hue::Grey,
                width: 1,
                dashed: true,
                marker: Marker::None,
            };
            draw_path(root, stroke, vec![at(own, up.0), at(own, up.1)])?;
        }
        for Line { stroke, points, .. } in lines {
            let above = points.iter().map(|point| at(point.x, point.y + point.band));
            let below = points.iter().rev().map(|point| at(point.x, point.y - point.band));
            let band: Vec<Pixel> = above.chain(below).collect();
            root.draw(&Polygon::new(band, stroke.hue.color().mix(0.13)))
                .map_err(drawing)?;
        }
        // Thin ones upon thick ones, so that equal ones are both seen.
        let mut ordered: Vec<&Line> = lines.iter().collect();
        ordered.sort_by_key(|line| std::cmp::Reverse(line.stroke.width));
        for Line { stroke, points, .. } in ordered {
            let path: Vec<Pixel> = points.iter().map(|point| at(point.x, point.y)).collect();
            draw_path(root, *stroke, path.clone())?;
            for place in path {
                draw_marker(root, *stroke, place)?;
            }
        }
        Ok(())
    })
}

const BINS: usize = 12;

/// How many values of each series fall where, from 0 on.
pub fn histogram(series: &[(String, Hue, Vec<f64>)], axis: &Axis, label: &str) -> anyhow::Result<String> {
    let legend: Vec<(String, Mark)> = (series.iter())
        .map(|(name, hue, _)| (name.clone(), Mark::Box(hue.color())))
        .collect();
    let largest = (series.iter().flat_map(|(_, _, values)| values))
        .copied()
        .fold(0.0, f64::max);
    let high = if largest > 0.0 {
        largest * 1.0001
    } else {
        axis.scale * 0.01
    };
    let counts: Vec<Vec<usize>> = (series.iter())
        .map(|(_, _, values)| {
            let mut counts = vec![0; BINS];
            for value in values {
                counts[((value / high * BINS as f64) as usize).min(BINS - 1)] += 1;
            }
            counts
        })
        .collect();
    let most = counts.iter().flatten().copied().max().unwrap_or(0).max(1) as f64;
    let count_axis = Axis {
        label: label.to_owned(),
        scale: 1.0,
        in_proportion: false,
    };
    picture(300, &legend, |root, body| {
        let mut y = Side::numbers(&count_axis, (0.0, most * 1.05));
        y.ticks.retain(|tick| tick.fract() == 0.0);
        let mut x = Side::numbers(axis, (0.0, high));
        x.lines = false;
        let chart = axes(body, &x, &y)?;
        let width = high / BINS as f64;
        for (index, (counts, (_, hue, _))) in counts.iter().zip(series).enumerate() {
            let part = 0.86 / series.len() as f64;
            for (bin, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
                let left = bin as f64 + 0.07 + index as f64 * part;
                let corners = [
                    pixel(&chart, left * width, count as f64),
                    pixel(&chart, (left + part) * width, 0.0),
                ];
                draw_box(root, corners, hue.color())?;
            }
        }
        Ok(())
    })
}

/// Names of columns or rows, and what they are.
pub struct Names {
    pub names: Vec<String>,
    pub label: String,
}

/// How far each cell, `[column][row]`, is above the least; without a number it is left out. `chosen` is framed.
pub fn heat_map(
    columns: &Names,
    rows: &Names,
    cells: &[Vec<Option<f64>>],
    chosen: Option<(usize, usize)>,
) -> anyhow::Result<String> {
    let numbers = || cells.iter().flatten().flatten().copied();
    let least = numbers().fold(f64::INFINITY, f64::min);
    let most = numbers().fold(least, f64::max);
    let legend: Vec<(String, Mark)> = [("the least", 0.0), ("", 0.25), ("", 0.5), ("", 0.75), ("the most", 1.0)]
        .map(|(name, part)| (name.to_owned(), Mark::Box(cividis(1.0 - part).mix(1.0))))
        .into();
    let row = (360 / rows.names.len().max(1) as i32).clamp(22, 48);
    let room = (WIDTH - 100) / columns.names.len().max(1) as i32;
    picture(row * rows.names.len() as i32 + 62, &legend, |root, body| {
        let x = Side::names(&columns.names, &columns.label, WIDTH - 100, 30);
        let y = Side::names(&rows.names, &rows.label, row * rows.names.len() as i32, 18);
        let chart = axes(body, &x, &y)?;
        for (column, values) in cells.iter().enumerate() {
            for (row, &value) in values.iter().enumerate() {
                let Some(value) = value else { continue };
                let (left, bottom) = (column as f64, row as f64);
                let part = match most > least {
                    true => (value / least).ln() / (most / least).ln(),
                    false => 0.0,
                };
                let color = cividis(1.0 - part);
                let corners = [
                    pixel(&chart, left + 0.02, bottom + 0.98),
                    pixel(&chart, left + 0.98, bottom + 0.02),
                ];
                draw_box(root, corners, color.mix(1.0))?;
                let above = value / least - 1.0;
                let text = match above {
                    above if above < 5e-4 => "best".to_owned(),
                    above if above < 0.1 => format!("+{:.1} %", above * 100.0),
                    above => format!("+{:.0} %", above * 100.0),
                };
                if room >= LETTER * (text.len() as i32 + 1) {
                    let ink = if luminance(color) > 0.18 { BLACK } else { WHITE };
                    let style = text_style(FONT - 1)
                        .color(&ink)
                        .pos(Pos::new(HPos::Center, VPos::Center));
                    let middle = pixel(&chart, left + 0.5, bottom + 0.5);
                    root.draw(&Text::new(text, middle, style)).map_err(drawing)?;
                }
            }
        }
        if let Some((column, row)) = chosen {
            let (left, bottom) = (column as f64, row as f64);
            let frame: Vec<Pixel> = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]
                .map(|(x, y)| pixel(&chart, left + x, bottom + y))
                .into();
            let style = VERMILLION.stroke_width(4);
            root.draw(&PathElement::new(frame, style)).map_err(drawing)?;
        }
        Ok(())
    })
}

/// From dark blue over grey to yellow, of even steps for colour-blind eyes too.
fn cividis(part: f64) -> RGBColor {
    const STOPS: [(f64, f64, f64); 5] = [
        (0.0, 34.0, 78.0),
        (66.0, 78.0, 108.0),
        (125.0, 124.0, 120.0),
        (188.0, 175.0, 111.0),
        (254.0, 232.0, 56.0),
    ];
    let place = part.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let index = (place as usize).min(STOPS.len() - 2);
    let (from, to, rest) = (STOPS[index], STOPS[index + 1], place - index as f64);
    let mix = |a: f64, b: f64| (a + (b - a) * rest).round() as u8;
    RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

fn luminance(color: RGBColor) -> f64 {
    let linear = |part: u8| (f64::from(part) / 255.0).powf(2.2);
    0.2126 * linear(color.0) + 0.7152 * linear(color.1) + 0.0722 * linear(color.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(ticks(0.0, 10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(-3.0, 3.0), [-2.0, 0.0, 2.0]);
        assert_eq!(ticks(1.0, 1.0), [1.0]);
        let ticks = ticks_in_proportion(1.25, 20.0);
        assert!(
            ticks.len() >= 4 && ticks.iter().all(|tick| (1.25..=20.0).contains(tick)),
            "{ticks:?}"
        );
    }

    #[test]
    fn pictures_have_no_fixed_ink_and_every_number_is_one() {
        let axis = Axis {
            label: "x < y".to_owned(),
            scale: 1.0,
            in_proportion: false,
        };
        let part = Part {
            name: "p".to_owned(),
            hue: Hue::Sky,
            values: vec![0.0, 0.0],
        };
        let names = ["0".to_owned(), "1".to_owned()];
        let bars = stacked_bars(&names, "client", &[part], &axis).unwrap();
        let nothing = histogram(&[("best".to_owned(), Hue::Blue, vec![0.0; 3])], &axis, "draws").unwrap();
        let map = owners(&[0, 1, 0], &[0.0, 0.0, 0.0], 2, "0 W").unwrap();
        for svg in [bars, nothing, map] {
            assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
            assert!(
                !svg.contains(INK_NAME) && !svg.contains("NaN") && !svg.contains("inf"),
                "{svg}"
            );
        }
    }
}
