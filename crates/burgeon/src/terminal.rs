//! The user's terminal in raw mode, put back when the value goes.

use std::io::IsTerminal;

use burgeon_api::exec::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

pub(crate) struct Raw {
    before: Termios,
}

impl Raw {
    /// Raw mode, if standard input is a terminal.
    pub(crate) fn enter() -> Option<Raw> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(Raw { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before) {
            tracing::debug!(%error, "the terminal could not be put back");
        }
    }
}

pub(crate) fn size() -> TerminalSize {
    match tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_col > 0 => TerminalSize { rows: size.ws_row, columns: size.ws_col },
        _ => TerminalSize { rows: 24, columns: 80 },
    }
}

pub(crate) fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}
