//! Compares a desired configuration with the one a server reports.

use serde_json::{Map, Value};

use protocol::bootstrap::Difference;

/// A JetStream configuration: its fields as the JSON API names them.
pub type Config = Map<String, Value>;

/// Prefix of the keys that the server itself adds to `metadata`.
const SERVER_KEYS: &str = "_nats.";

/// Each field of `wanted` that has another value in `actual`. Fields that only `actual` has are not
/// compared.
pub fn differences(object: &str, wanted: &Config, actual: &Config) -> Vec<Difference> {
    let differs = |(field, wanted): (&String, &Value)| {
        let actual = actual.get(field).unwrap_or(&Value::Null);
        (!same(wanted, actual)).then(|| Difference {
            object: object.to_owned(),
            field: field.clone(),
            wanted: wanted.clone(),
            actual: actual.clone(),
        })
    };
    wanted.iter().filter_map(differs).collect()
}

/// `actual`, with every field of `wanted` written over it.
pub fn overlaid(actual: &Config, wanted: &Config) -> Config {
    let mut merged = actual.clone();
    merged.extend(wanted.clone());
    merged
}

/// The server does not report a field that is zero, false or empty, so those equal a missing field.
fn same(wanted: &Value, actual: &Value) -> bool {
    match (wanted, actual) {
        (Value::Object(wanted), Value::Object(actual)) => {
            let mut keys = wanted
                .keys()
                .chain(actual.keys())
                .filter(|key| !key.starts_with(SERVER_KEYS));
            keys.all(|key| {
                same(
                    wanted.get(key).unwrap_or(&Value::Null),
                    actual.get(key).unwrap_or(&Value::Null),
                )
            })
        }
        _ => wanted == actual || is_unset(wanted) && is_unset(actual),
    }
}

/// Whether this is a value that the server does not report: zero, false or empty.
pub fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_f64() == Some(0.0),
        Value::String(value) => value.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields
            .iter()
            .all(|(key, value)| key.starts_with(SERVER_KEYS) || is_unset(value)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(wanted: &Value, actual: &Value) -> Vec<String> {
        let found = differences(
            "stream X",
            wanted.as_object().unwrap(),
            actual.as_object().unwrap(),
        );
        found
            .into_iter()
            .map(|difference| difference.field)
            .collect()
    }

    #[test]
    fn a_field_differs_when_its_value_does() {
        let actual = json!({
            "max_bytes": 10,
            "subjects": ["a", "b"],
            "republish": {"src": ">", "dest": "live.>"},
            "first_seq": 7,
        });
        assert!(
            fields(
                &json!({"max_bytes": 10, "republish": {"src": ">", "dest": "live.>"}}),
                &actual
            )
            .is_empty()
        );
        assert_eq!(fields(&json!({"max_bytes": 11}), &actual), ["max_bytes"]);
        assert_eq!(fields(&json!({"subjects": ["a"]}), &actual), ["subjects"]);
        assert_eq!(
            fields(
                &json!({"republish": {"src": ">", "dest": "other.>"}}),
                &actual
            ),
            ["republish"]
        );
        assert_eq!(
            fields(&json!({"allow_direct": true}), &actual),
            ["allow_direct"]
        );
    }

    #[test]
    fn a_field_the_server_does_not_report_is_zero() {
        let wanted = json!({
            "max_age": 0, "allow_msg_ttl": false, "description": "", "metadata": {},
            "placement": null,
        });
        assert!(fields(&wanted, &json!({})).is_empty());
        assert_eq!(
            fields(&wanted, &json!({"max_age": 5, "allow_msg_ttl": true})),
            ["allow_msg_ttl", "max_age"]
        );
    }

    #[test]
    fn inside_an_object_everything_is_compared_but_the_servers_own_keys() {
        let wanted =
            json!({"republish": {"src": ">", "dest": "live.>"}, "metadata": {"owner": "me"}});
        let actual = json!({
            "republish": {"src": ">", "dest": "live.>", "headers_only": true},
            "metadata": {"owner": "me", "_nats.ver": "2"},
        });
        assert_eq!(fields(&wanted, &actual), ["republish"]);
    }

    #[test]
    fn fields_only_the_server_has_are_kept() {
        let actual = json!({"a": 1, "b": {"c": 1}, "first_seq": 9});
        let wanted = json!({"a": 2, "b": {"d": 1}});
        let merged = overlaid(actual.as_object().unwrap(), wanted.as_object().unwrap());
        assert_eq!(
            Value::Object(merged),
            json!({"a": 2, "b": {"d": 1}, "first_seq": 9})
        );
    }
}
