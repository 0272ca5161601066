//! The picture in the README: shapes and arrows as data, drawn as SVG.

use std::fmt::Write as _;

const WIDTH: u32 = 990;
const HEIGHT: u32 = 410;
/// Functions without a place of their own stand in one more row, below everything else.
const MORE_TOP: u32 = 450;
const MORE_HEIGHT: u32 = 60;

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

struct Shape<'a> {
    class: &'static str,
    name: &'a str,
    about: &'static str,
    /// Left, top, width, height.
    place: [u32; 4],
}

const fn shape<'a>(
    class: &'static str,
    name: &'a str,
    about: &'static str,
    place: [u32; 4],
) -> Shape<'a> {
    Shape {
        class,
        name,
        about,
        place,
    }
}

const fn function(name: &str, left: u32, top: u32, width: u32) -> Shape<'_> {
    shape("function", name, "", [left, top, width, 40])
}

const SHAPES: &[Shape<'static>] = &[
    function("send-message", 20, 40, 150),
    function("delete-message", 20, 100, 150),
    shape("outside", "your publishers", "", [20, 160, 150, 40]),
    shape(
        "server",
        "CHAT_MESSAGES",
        "stream: order, durability",
        [240, 40, 180, 160],
    ),
    function("persist-message", 480, 100, 150),
    shape("server", "PostgreSQL", "projection", [690, 40, 110, 160]),
    function("relay-outbox", 840, 40, 150),
    shape(
        "server",
        "CHAT_EVENTS",
        "stream: events",
        [840, 120, 150, 80],
    ),
    shape("outside", "live readers", "live.>", [235, 262, 110, 56]),
    shape(
        "group",
        "",
        "every read is the union of the two",
        [370, 240, 450, 92],
    ),
    function("get-history", 380, 256, 150),
    function("sync-messages", 535, 256, 150),
    function("track-receipts", 690, 256, 120),
    shape(
        "outside",
        "your services",
        "events.v1.>",
        [855, 262, 120, 56],
    ),
    shape(
        "group",
        "",
        "operators: desired state, audit, replay, dead letters, trimming, expiry",
        [240, 350, 580, 80],
    ),
    function("stream-bootstrap", 255, 362, 150),
    function("manage-dead-letters", 447, 362, 166),
    function("enforce-retention", 655, 362, 150),
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

/// The whole file; shows every one of `functions`.
pub fn draw(functions: &[String]) -> String {
    let is_missing = |name: &&String| SHAPES.iter().all(|shape| shape.name != name.as_str());
    let more: Vec<&String> = functions.iter().filter(is_missing).collect();
    let height = if more.is_empty() {
        HEIGHT
    } else {
        HEIGHT + MORE_HEIGHT
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"10 30 {WIDTH} {height}\" \
         role=\"img\">\n\
         <title>Messages flow from publishers through a stream into PostgreSQL and on as \
         events</title>\n\
         <style>\n{STYLE}\n</style>\n\
         <defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"8\" \
         markerHeight=\"8\" orient=\"auto\"><path d=\"M0 0 L8 4 L0 8 Z\"/></marker></defs>\n"
    );
    for shape in SHAPES {
        draw_shape(&mut svg, shape);
    }
    for (left, name) in (20..).step_by(170).zip(more) {
        draw_shape(&mut svg, &function(name, left, MORE_TOP, 150));
    }
    for (path, label) in ARROWS {
        draw_arrow(&mut svg, path, label);
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw_shape(svg: &mut String, shape: &Shape<'_>) {
    let [left, top, width, height] = shape.place;
    let _ = writeln!(
        svg,
        "<rect class=\"{}\" x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\"/>",
        shape.class
    );
    let middle = left + width / 2;
    let name_at = top + height / 2 + if shape.about.is_empty() { 5 } else { 0 };
    if !shape.name.is_empty() {
        let name = shape.name;
        let _ = writeln!(svg, "<text x=\"{middle}\" y=\"{name_at}\">{name}</text>");
    }
    if !shape.about.is_empty() {
        // A group has no name, and says at its lower edge what it is.
        let about_at = if shape.name.is_empty() {
            top + height - 12
        } else {
            name_at + 18
        };
        let about = shape.about.replace('>', "&gt;");
        let _ = writeln!(
            svg,
            "<text class=\"about\" x=\"{middle}\" y=\"{about_at}\">{about}</text>"
        );
    }
}

fn draw_arrow(svg: &mut String, path: &str, label: &str) {
    let _ = writeln!(svg, "<path d=\"{path}\"/>");
    if label.is_empty() {
        return;
    }
    // A path has the form `M10 20 …`.
    let numbers = path[1..].split(' ').filter_map(|part| part.parse().ok());
    let [x, y] = numbers.collect::<Vec<u32>>()[..] else {
        return;
    };
    let _ = writeln!(
        svg,
        "<text class=\"about\" x=\"{}\" y=\"{}\" style=\"text-anchor: start\">{label}</text>",
        x + 8,
        y + 22
    );
}
