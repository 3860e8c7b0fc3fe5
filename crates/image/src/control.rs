//! Debian's control format: paragraphs of fields, as in `control` files and package lists.

/// One paragraph; names keep the case of the file and are compared without it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Paragraph {
    fields: Vec<(String, String)>,
}

impl Paragraph {
    /// The value of a field, with its continuation lines.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(crate) fn is(&self, name: &str, value: &str) -> bool {
        self.get(name).is_some_and(|found| found.trim() == value)
    }

    pub(crate) fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// Splits a text into its paragraphs. Lines that belong to no field are left out.
pub(crate) fn paragraphs(text: &str) -> impl Iterator<Item = Paragraph> + '_ {
    text.split("\n\n").map(paragraph).filter(|paragraph| !paragraph.fields.is_empty())
}

pub(crate) fn paragraph(text: &str) -> Paragraph {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.to_string(), value.trim().to_string()));
        }
    }
    Paragraph { fields }
}

/// Names of the packages in a dependency field, alternatives included, in order.
pub(crate) fn dependency_names(field: &str) -> impl Iterator<Item = &str> {
    field.split([',', '|']).filter_map(|part| part.split_whitespace().next()).map(|name| {
        // `name:any` asks for a package of any architecture.
        name.split(':').next().unwrap_or(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_and_continuations_read() {
        let text = "Package: a\nEssential: yes\nDescription: short\n long\n .\n more\n\nPackage: b\nDepends: c (= 1), d:any | e\n";
        let all: Vec<Paragraph> = paragraphs(text).collect();
        assert_eq!(all.len(), 2);
        assert!(all[0].is("essential", "yes"));
        assert_eq!(all[0].get("Description"), Some("short\n long\n .\n more"));
        assert_eq!(dependency_names(all[1].get("Depends").unwrap()).collect::<Vec<_>>(), ["c", "d", "e"]);
    }
}
