//! A drawing of a herd: how long each start took, what memory the host had lost by then, and what that is made of.

use super::report::{Memory, Report, Start};

/// Width of the drawing in pixels.
const WIDTH: f64 = 800.0;
/// Height of a panel.
const HEIGHT: f64 = 220.0;
/// Height of the bar of memory.
const BAR: f64 = 28.0;
/// Room for numbers and names around a panel.
const MARGIN: f64 = 60.0;
/// Where a panel begins and ends.
const LEFT: f64 = MARGIN;
const RIGHT: f64 = WIDTH - MARGIN;
/// Colours of the bar's parts.
const COLOURS: [&str; 5] = ["#1565c0", "#6a1b9a", "#2e7d32", "#ef6c00", "#757575"];

/// Panels one above the other: starts and memory over the number of the container, and the memory of one in its parts.
pub(super) fn svg(report: &Report) -> String {
    let height = 2.0 * (HEIGHT + MARGIN) + 2.0 * MARGIN + BAR;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let first = report.starts.first().map_or(0, |start| start.available_kib);
    let lost = |start: &Start| first.saturating_sub(start.available_kib) as f64 / 1024.0;
    let lines: Vec<_> =
        report.start_ms.iter().flat_map(|q| [("p50", q.p50), ("p90", q.p90), ("p99", q.p99)]).collect();
    let starts = Panel { top: MARGIN, title: "start of each container", unit: "ms", lines };
    starts.draw(&mut text, &report.starts, |start| start.ms);
    let title = "MemAvailable lost since the first";
    let memory = Panel { top: HEIGHT + 2.0 * MARGIN, title, unit: "MiB", lines: Vec::new() };
    memory.draw(&mut text, &report.starts, lost);
    if let Some(memory) = &report.memory {
        bar(&mut text, 2.0 * (HEIGHT + MARGIN) + MARGIN, memory);
    }
    text.push_str("</svg>\n");
    text
}

/// A panel with a point for each start.
struct Panel {
    top: f64,
    title: &'static str,
    unit: &'static str,
    /// Names of values, and the values.
    lines: Vec<(&'static str, f64)>,
}

impl Panel {
    fn draw(&self, text: &mut String, starts: &[Start], value: impl Fn(&Start) -> f64) {
        let Self { top, title, unit, lines } = self;
        let most = starts.iter().map(&value).fold(f64::MIN_POSITIVE, f64::max);
        let last = starts.last().map_or(1, |start| start.number.max(1));
        let bottom = top + HEIGHT;
        let height_of = |value: f64| bottom - HEIGHT * (value.max(0.0) / most);
        let mut draw = |part: String| {
            text.push_str(&part);
            text.push('\n');
        };
        draw(format!("<text x=\"{LEFT}\" y=\"{}\">{title}</text>", top - 8.0));
        draw(format!(
            "<path d=\"M{LEFT} {top}V{bottom}H{RIGHT}\" fill=\"none\" stroke=\"black\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{most:.1} {unit}</text>\
             <text x=\"{}\" y=\"{bottom}\" text-anchor=\"end\">0</text>\
             <text x=\"{RIGHT}\" y=\"{}\" text-anchor=\"end\">{last}</text>",
            LEFT - 6.0,
            top + 10.0,
            LEFT - 6.0,
            bottom + 16.0,
        ));
        // Their names stand beside each other: the values may be close.
        for ((name, value), x) in lines.iter().zip([0.0, 90.0, 180.0]) {
            let y = height_of(*value);
            draw(format!(
                "<path d=\"M{LEFT} {y:.1}H{RIGHT}\" stroke=\"#bdbdbd\" stroke-dasharray=\"4 4\"/>\
                 <text x=\"{}\" y=\"{:.1}\">{name} {value:.1}</text>",
                LEFT + 6.0 + x,
                y - 3.0
            ));
        }
        for start in starts {
            let x = LEFT + (RIGHT - LEFT) * f64::from(start.number) / f64::from(last);
            let y = height_of(value(start));
            draw(format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"1.5\" fill=\"#1565c0\"/>"));
        }
    }
}

/// What one container takes of the host, part by part.
fn bar(text: &mut String, top: f64, memory: &Memory) {
    let parts = [
        ("guest's own pages", memory.guest_private_kib),
        ("machine's process", memory.vmm_kib),
        ("owner", memory.owner_kib),
        ("kernel", memory.kernel.total_kib()),
        ("rest", memory.rest_kib),
    ];
    let mib = |kib: f64| kib / 1024.0;
    // A part that came out below nothing takes no room, and says so by its number.
    let all: f64 = parts.iter().map(|(_, kib)| kib.max(0.0)).sum::<f64>().max(f64::MIN_POSITIVE);
    let title = format!("memory of each: {:.2} MiB of MemAvailable", mib(memory.taken_kib));
    text.push_str(&format!("<text x=\"{LEFT}\" y=\"{}\">{title}</text>\n", top - 8.0));
    let (mut x, mut name_x) = (LEFT, LEFT);
    for ((name, kib), colour) in parts.into_iter().zip(COLOURS) {
        let width = (RIGHT - LEFT) * kib.max(0.0) / all;
        text.push_str(&format!(
            "<rect x=\"{x:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\
             <text x=\"{name_x:.1}\" y=\"{}\" fill=\"{colour}\">{name} {:.2}</text>\n",
            top + BAR + 16.0,
            mib(kib),
        ));
        x += width;
        name_x += (RIGHT - LEFT) / COLOURS.len() as f64;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::report::Kernel;
    use super::*;

    fn report() -> Report {
        let starts = [1, 2, 4].map(|number| Start {
            number,
            ms: 10.0 * f64::from(number),
            available_kib: 9000 - 1024 * i64::from(number),
        });
        Report::new(4, &starts, Default::default(), Duration::from_secs(1))
    }

    #[test]
    fn every_start_is_a_point_in_both_panels_and_within_them() {
        let text = svg(&report());
        assert_eq!(text.matches("<circle").count(), 6);
        assert!(text.contains("40.0 ms") && text.contains("3.0 MiB"), "{text}");
        // The slowest and last is in the upper right corner of its panel.
        assert!(text.contains("<circle cx=\"740.0\" cy=\"60.0\""), "{text}");
        // Half as high as the slowest.
        assert!(text.contains("M60 170.0H740") && text.contains(">p50 20.0<"), "{text}");
    }

    #[test]
    fn the_parts_of_the_memory_fill_the_bar_and_what_is_below_nothing_has_no_room() {
        let kernel = Kernel { slab_kib: 512.0, page_tables_kib: 512.0, ..Kernel::default() };
        let memory = Memory {
            taken_kib: 6.0 * 1024.0,
            guest_private_kib: 4096.0,
            vmm_kib: 2048.0,
            owner_kib: 1024.0,
            kernel,
            rest_kib: -2048.0,
            ..Memory::default()
        };
        let text = svg(&Report { memory: Some(memory), ..report() });
        assert!(text.contains("memory of each: 6.00 MiB"), "{text}");
        for part in ["guest's own pages 4.00", "machine's process 2.00", "kernel 1.00", "rest -2.00"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // Of 680 pixels: half, a quarter, an eighth, an eighth, none.
        for width in ["340.0", "170.0", "85.0", "0.0"] {
            assert!(text.contains(&format!("width=\"{width}\"")), "{width}: {text}");
        }
    }

    #[test]
    fn a_herd_of_none_is_drawn_too() {
        let text = svg(&Report::new(1, &[], Default::default(), Duration::from_secs(1)));
        assert!(text.ends_with("</svg>\n") && !text.contains("NaN"));
    }
}
