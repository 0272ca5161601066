//! What `--help` and `--variables` print.

use std::fmt::Write;

use serde_json::{Value, json};

use super::Variable;

const COLUMNS: usize = 100;
/// Where the text begins, behind the longest name.
const INDENT: usize = 27;

/// The variables for a reader at a terminal.
pub(crate) fn help(variables: &[Variable]) -> String {
    let mut text = String::new();
    for variable in variables {
        let name = variable.name();
        let mut line = format!("  {name:<width$}", width = INDENT - 2);
        for word in one_line(variable).split_whitespace() {
            if line.len() + word.len() > COLUMNS {
                let _ = writeln!(text, "{}", line.trim_end());
                line = " ".repeat(INDENT);
            }
            line.push_str(word);
            line.push(' ');
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// The help with everything else that is known. Without Markdown's quotes.
fn one_line(variable: &Variable) -> String {
    let mut text = variable.help.trim().replace('`', "");
    if variable.is_required() {
        text.push_str(" Required.");
    }
    if let Some(default) = variable.default {
        let _ = write!(text, " Default: {}.", default());
    }
    if let Some(range) = variable.range {
        let _ = write!(text, " Range: {}.", range());
    }
    if variable.secret {
        let _ = write!(text, " Or {}_FILE.", variable.name());
    }
    text
}

/// The variables for a program: an array of objects.
pub(crate) fn json(variables: &[Variable]) -> Value {
    let object = |variable: &Variable| {
        json!({
            "name": variable.name(),
            "type": variable.kind,
            "required": variable.is_required(),
            "default": variable.default.map(|default| default()),
            "range": variable.range.map(|range| range()),
            "secret": variable.secret,
            "help": variable.help.trim(),
        })
    };
    variables.iter().map(object).collect()
}
