//! The picture in the README: boxes and arrows as data, drawn as SVG.

use std::fmt::Write as _;

const WIDTH: u32 = 990;
const HEIGHT: u32 = 410;

/// Dark where the reader's system is.
const STYLE: &str = "\
text { font: 14px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
.about { font-size: 12px; fill: #59636e }
rect { fill: #ffffff; stroke: #818b98; rx: 8 }
.server { fill: #ddf4ff; stroke: #0969da }
.outside { stroke-dasharray: 4 4; fill: none }
.group { fill: none; stroke: #d1d9e0 }
path { stroke: #59636e; fill: none; marker-end: url(#tip) }
#tip path { fill: #59636e; stroke: none; marker-end: none }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .about { fill: #9198a1 }
  rect { fill: #151b23; stroke: #656c76 } .group { stroke: #3d444d; fill: none }
  .server { fill: #121d2f; stroke: #4493f8 } .outside { fill: none }
  path { stroke: #9198a1 } #tip path { fill: #9198a1 }
}";

struct Box {
    class: &'static str,
    /// A function's, or a server's.
    name: &'static str,
    about: &'static str,
    /// Left, top, width, height.
    place: [u32; 4],
}

const fn function(name: &'static str, left: u32, top: u32) -> Box {
    Box {
        class: "function",
        name,
        about: "",
        place: [left, top, 150, 40],
    }
}

const BOXES: &[Box] = &[
    function("send-message", 20, 40),
    function("delete-message", 20, 100),
    Box {
        class: "outside",
        name: "your publishers",
        about: "",
        place: [20, 160, 150, 40],
    },
    Box {
        class: "server",
        name: "CHAT_MESSAGES",
        about: "stream: order, durability",
        place: [240, 40, 180, 160],
    },
    function("persist-message", 480, 100),
    Box {
        class: "server",
        name: "PostgreSQL",
        about: "projection",
        place: [690, 40, 110, 160],
    },
    function("relay-outbox", 840, 40),
    Box {
        class: "server",
        name: "CHAT_EVENTS",
        about: "stream: events",
        place: [840, 120, 150, 80],
    },
    Box {
        class: "outside",
        name: "live readers",
        about: "live.>",
        place: [235, 262, 110, 56],
    },
    Box {
        class: "group",
        name: "",
        about: "every read is the union of the two",
        place: [370, 240, 450, 92],
    },
    function("get-history", 380, 256),
    function("sync-messages", 535, 256),
    Box {
        class: "function",
        name: "track-receipts",
        about: "",
        place: [690, 256, 120, 40],
    },
    Box {
        class: "outside",
        name: "your services",
        about: "events.v1.>",
        place: [855, 262, 120, 56],
    },
    Box {
        class: "group",
        name: "",
        about: "operators: desired state, audit, replay, dead letters, trimming, expiry",
        place: [240, 350, 580, 80],
    },
    function("stream-bootstrap", 255, 362),
    Box {
        class: "function",
        name: "manage-dead-letters",
        about: "",
        place: [447, 362, 166, 40],
    },
    function("enforce-retention", 655, 362),
];

/// The path, and what travels along it.
const ARROWS: &[(&str, &str)] = &[
    ("M170 60 H234", ""),
    ("M170 120 H234", ""),
    ("M170 180 H234", ""),
    ("M420 120 H474", ""),
    ("M630 120 H684", ""),
    ("M800 60 H834", ""),
    ("M915 80 V114", ""),
    ("M290 200 V256", ""),
    ("M400 200 V234", "not stored yet"),
    ("M745 200 V234", "stored"),
    ("M915 200 V256", ""),
];

/// Every box with a name, for the test that no function is missing.
pub fn names() -> impl Iterator<Item = &'static str> {
    BOXES.iter().map(|shown| shown.name)
}

/// The whole file.
pub fn draw() -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"10 30 {WIDTH} {HEIGHT}\" role=\"img\">\n\
         <title>Messages flow from publishers through a stream into PostgreSQL and on as events</title>\n\
         <style>\n{STYLE}\n</style>\n\
         <defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"8\" \
         markerHeight=\"8\" orient=\"auto\"><path d=\"M0 0 L8 4 L0 8 Z\"/></marker></defs>\n"
    );
    for shown in BOXES {
        draw_box(&mut svg, shown);
    }
    for (path, label) in ARROWS {
        let _ = writeln!(svg, "<path d=\"{path}\"/>");
        if !label.is_empty() {
            let [x, y] = start(path);
            let _ = writeln!(
                svg,
                "<text class=\"about\" x=\"{}\" y=\"{}\" style=\"text-anchor: start\">{label}</text>",
                x + 8,
                y + 22
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw_box(svg: &mut String, shown: &Box) {
    let [left, top, width, height] = shown.place;
    let middle = left + width / 2;
    let _ = writeln!(
        svg,
        "<rect class=\"{}\" x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\"/>",
        shown.class
    );
    let name_at = match (shown.about, height) {
        ("", _) => top + height / 2 + 5,
        _ => top + height / 2 - 3,
    };
    if !shown.name.is_empty() {
        let _ = writeln!(
            svg,
            "<text x=\"{middle}\" y=\"{name_at}\">{}</text>",
            shown.name
        );
    }
    if !shown.about.is_empty() {
        let about_at = if shown.name.is_empty() {
            top + height - 12
        } else {
            name_at + 18
        };
        let about = shown.about.replace('>', "&gt;");
        let _ = writeln!(
            svg,
            "<text class=\"about\" x=\"{middle}\" y=\"{about_at}\">{about}</text>"
        );
    }
}

/// Where a path of the form `M10 20 …` begins.
fn start(path: &str) -> [u32; 2] {
    let mut numbers = path[1..]
        .split(' ')
        .map(|number| number.parse().unwrap_or(0));
    [numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)]
}
