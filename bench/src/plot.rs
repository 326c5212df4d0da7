//! Bar charts as SVG, for reports: groups of bars side by side, a linear or logarithmic axis, reference lines.
//!
//! Text and lines take their colour from the reader's colour scheme; bars have colours that show on light and dark.

use std::fmt::Write as _;

use crate::table::number;

/// A chart: one bar for each series in each group.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What is shown.
    pub title: String,
    /// The unit of the values, beside the axis.
    pub unit: String,
    /// The value axis.
    pub axis: Axis,
    /// Names of the series, in the order of each group's values.
    pub series: Vec<String>,
    /// The groups, from left to right.
    pub groups: Vec<Group>,
    /// Lines across the chart.
    pub references: Vec<Reference>,
}

/// How values become heights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// From zero.
    Linear,
    /// In powers of ten; only for values above zero.
    Logarithmic,
}

/// Bars that stand together.
#[derive(Clone, Debug)]
pub struct Group {
    /// Below the bars.
    pub label: String,
    /// A value for each series; none where it was not measured.
    pub values: Vec<Option<f64>>,
}

/// A line at a value, such as a goal or a floor.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Its name, at the line's end.
    pub label: String,
    /// Where it is.
    pub value: f64,
}

const COLORS: [&str; 6] = ["#3d87c9", "#e0861f", "#2f9e6e", "#c6567e", "#8b70ca", "#7f8a94"];

/// Pixels.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const PLOT: f64 = 240.0;
/// Title and legend above the bars.
const ABOVE: f64 = 64.0;
/// Labels below them, and the distance to the next chart.
const BELOW: f64 = 52.0;
const CHART: f64 = ABOVE + PLOT + BELOW;

const STYLE: &str = "<style>\n\
    svg { font: 12px system-ui, sans-serif; color: #24292f; background: #ffffff }\n\
    text { fill: currentColor } .title { font-size: 15px; font-weight: 600 } .value { font-size: 10px }\n\
    .grid { stroke: currentColor; stroke-opacity: 0.15 } .base { stroke: currentColor; stroke-opacity: 0.6 }\n\
    .reference { stroke: currentColor; stroke-opacity: 0.8; stroke-dasharray: 5 4 }\n\
    @media (prefers-color-scheme: dark) { svg { color: #e6edf3; background: #0d1117 } }\n\
    </style>\n";

/// Draws charts below each other.
pub fn svg(charts: &[Chart]) -> String {
    let height = CHART * charts.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\">\n{STYLE}"
    );
    for (i, chart) in charts.iter().enumerate() {
        draw(&mut out, chart, CHART * i as f64);
    }
    out += "</svg>\n";
    out
}

/// The value axis in pixels.
struct Scale {
    axis: Axis,
    low: f64,
    high: f64,
    bottom: f64,
}

impl Scale {
    fn new(chart: &Chart, bottom: f64) -> Self {
        let values = || {
            let bars = chart.groups.iter().flat_map(|group| group.values.iter().flatten().copied());
            bars.chain(chart.references.iter().map(|reference| reference.value)).filter(|value| *value > 0.0)
        };
        let most = values().fold(0.0, f64::max);
        let least = values().fold(f64::INFINITY, f64::min);
        let (low, high) = match chart.axis {
            _ if most == 0.0 => (if chart.axis == Axis::Linear { 0.0 } else { 0.1 }, 1.0),
            Axis::Linear => (0.0, step(most) * (most / step(most)).ceil()),
            // Half a decade below the least, so that its bar has a height.
            Axis::Logarithmic => (10f64.powf((least.log10() - 0.5).floor()), 10f64.powf(most.log10().ceil())),
        };
        Self { axis: chart.axis, low, high, bottom }
    }

    fn y(&self, value: f64) -> f64 {
        let share = match self.axis {
            Axis::Linear => value / self.high,
            Axis::Logarithmic => (value.max(self.low) / self.low).log10() / (self.high / self.low).log10(),
        };
        self.bottom - PLOT * share.clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        match self.axis {
            Axis::Linear => {
                let step = step(self.high);
                (0..=(self.high / step).round() as u32).map(|n| f64::from(n) * step).collect()
            }
            Axis::Logarithmic => {
                let decades = (self.high / self.low).log10().round() as i32;
                (0..=decades).map(|decade| self.low * 10f64.powi(decade)).collect()
            }
        }
    }
}

/// A round step that divides a range into four to ten parts.
fn step(range: f64) -> f64 {
    let decade = 10f64.powf(range.log10().floor());
    let parts = range / decade;
    decade
        * if parts > 4.0 {
            1.0
        } else if parts > 2.0 {
            0.5
        } else {
            0.2
        }
}

fn draw(out: &mut String, chart: &Chart, top: f64) {
    let scale = Scale::new(chart, top + ABOVE + PLOT);
    let (title, unit) = (escape(&chart.title), escape(&chart.unit));
    let _ = writeln!(out, "<text class=\"title\" x=\"{LEFT}\" y=\"{:.1}\">{title}</text>", top + 24.0);
    let _ = writeln!(out, "<text x=\"8\" y=\"{:.1}\">{unit}</text>", top + ABOVE - 12.0);
    for tick in scale.ticks() {
        let y = scale.y(tick);
        let class = if tick == scale.low { "base" } else { "grid" };
        line(out, class, y);
        let label = number(tick);
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT - 6.0,
            y + 4.0
        );
    }
    legend(out, chart, top + ABOVE - 18.0);
    bars(out, chart, &scale);
    for reference in &chart.references {
        let y = scale.y(reference.value);
        line(out, "reference", y);
        let label = escape(&reference.label);
        let _ = writeln!(
            out,
            "<text class=\"value\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            WIDTH - RIGHT,
            y - 3.0
        );
    }
}

fn line(out: &mut String, class: &str, y: f64) {
    let right = WIDTH - RIGHT;
    let _ =
        writeln!(out, "<line class=\"{class}\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
}

fn legend(out: &mut String, chart: &Chart, y: f64) {
    let mut x = LEFT;
    for (name, color) in chart.series.iter().zip(COLORS.iter().cycle()) {
        let _ = writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
            y - 9.0,
            x + 15.0,
            escape(name)
        );
        x += 34.0 + 7.0 * name.chars().count() as f64;
    }
}

fn bars(out: &mut String, chart: &Chart, scale: &Scale) {
    let room = (WIDTH - LEFT - RIGHT) / chart.groups.len().max(1) as f64;
    // A fifth of a group's room stays free between it and the next.
    let width = (room * 0.8 / chart.series.len().max(1) as f64).min(48.0);
    for (i, group) in chart.groups.iter().enumerate() {
        let middle = LEFT + room * (i as f64 + 0.5);
        let left = middle - width * chart.series.len() as f64 / 2.0;
        for (n, (value, color)) in group.values.iter().zip(COLORS.iter().cycle()).enumerate() {
            let Some(value) = value else { continue };
            let (x, y) = (left + width * n as f64, scale.y(*value));
            let _ = writeln!(
                out,
                "<rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{color}\"/>\
                 <text class=\"value\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                x + 1.0,
                width - 2.0,
                scale.bottom - y,
                x + width / 2.0,
                y - 3.0,
                number(*value)
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            scale.bottom + 18.0,
            escape(&group.label)
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(axis: Axis, values: &[[Option<f64>; 2]]) -> Chart {
        Chart {
            title: "a < b & c".into(),
            unit: "ns".into(),
            axis,
            series: vec!["one".into(), "two".into()],
            groups: values
                .iter()
                .map(|values| Group { label: "group".into(), values: values.to_vec() })
                .collect(),
            references: vec![Reference { label: "floor".into(), value: 24.0 }],
        }
    }

    fn heights(svg: &str) -> Vec<f64> {
        let bars = svg.lines().filter(|line| line.contains("<rect") && line.contains("class=\"value\""));
        bars.map(|line| {
            let (_, rest) = line.split_once("height=\"").expect("a rectangle has a height");
            rest.split('"').next().expect("a value").parse().expect("a number")
        })
        .collect()
    }

    #[test]
    fn heights_are_proportional_on_a_linear_axis() {
        let drawn = heights(&svg(&[chart(Axis::Linear, &[[Some(50.0), Some(100.0)], [None, Some(25.0)]])]));
        assert_eq!(drawn.len(), 3, "no bar where nothing was measured");
        assert!((drawn[1] / drawn[0] - 2.0).abs() < 0.01 && (drawn[0] / drawn[2] - 2.0).abs() < 0.01);
        assert!(drawn.iter().all(|height| (0.0..=PLOT).contains(height)));
    }

    #[test]
    fn decades_are_equally_high_on_a_logarithmic_axis() {
        let drawn = heights(&svg(&[chart(
            Axis::Logarithmic,
            &[[Some(10.0), Some(100.0)], [Some(1000.0), Some(0.0)]],
        )]));
        assert!(((drawn[1] - drawn[0]) - (drawn[2] - drawn[1])).abs() < 0.2, "{drawn:?}");
        assert_eq!(drawn[3], 0.0, "zero has no logarithm and no height");
    }

    #[test]
    fn text_is_escaped_and_empty_charts_draw() {
        let drawn = svg(&[chart(Axis::Linear, &[])]);
        assert!(
            drawn.contains("a &lt; b &amp; c") && drawn.starts_with("<svg") && drawn.ends_with("</svg>\n")
        );
        let mut empty = chart(Axis::Logarithmic, &[]);
        empty.references.clear();
        assert!(!svg(&[empty]).contains("NaN"));
    }

    #[test]
    fn ticks_are_round_and_few() {
        for range in [1.0, 7.3, 24.0, 99.0, 260.0, 1999.0] {
            let parts = range / step(range);
            assert!((3.0..=11.0).contains(&parts), "{range}: {parts}");
        }
    }
}
